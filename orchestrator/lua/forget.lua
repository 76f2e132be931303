-- epoch, age ms, jobs to skip, most -> jobs looked at, jobs forgotten; false when stale. Forgets what ended so long ago;
-- the oldest jobs are looked at. What storage holds of them brings them back.
if stale(ARGV[1]) then return false end
local before, forgotten = now_ms() - ARGV[2], 0
local ids = redis.call('ZRANGEBYSCORE', 'blip:jobs', '-inf', before, 'LIMIT', ARGV[3], ARGV[4])
for _, id in ipairs(ids) do
  local job = job_key(id)
  local meta = redis.call('HMGET', job, 'status', 'completed_at', 'failed_at', 'cancelled_at', 'spec')
  local at = {completed = meta[2], failed = meta[3], cancelled = meta[4]}
  if meta[1] and at[meta[1]] and tonumber(at[meta[1]]) <= before then
    local readable, spec = pcall(cjson.decode, meta[5])
    if readable and redis.call('HGET', 'blip:outputs', spec.output) == id then
      redis.call('HDEL', 'blip:outputs', spec.output)
    end
    drop_work(job)
    redis.call('DEL', job, job .. ':done', job .. ':codes')
    redis.call('ZREM', 'blip:jobs', id)
    forgotten = forgotten + 1
  end
end
return {#ids, forgotten}
