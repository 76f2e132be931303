-- job, epoch, hint ms, chunks... -> those still overdue, whose hints are to be published again; false when stale
local job, again = job_key(ARGV[1]), {}
if stale(ARGV[2]) then return false end
if redis.call('HGET', job, 'status') ~= 'in_progress' then return {} end
local now = now_ms()
for i = 4, #ARGV do
  local deadline = redis.call('ZSCORE', job .. ':inflight', ARGV[i])
  if deadline and tonumber(deadline) <= now then
    bury(job, ARGV[i])
    redis.call('ZADD', job .. ':inflight', now + ARGV[3], ARGV[i])
    again[#again + 1] = ARGV[i]
  end
end
return again
