-- job, epoch, most in flight, hint ms -> chunks to publish, or false when stale. Looks at a bounded number of chunks.
local job = job_key(ARGV[1])
if stale(ARGV[2]) then return false end
local meta = redis.call('HMGET', job, 'status', 'next', 'chunks')
if meta[1] ~= 'in_progress' then return {} end
local room = ARGV[3] - redis.call('ZCARD', job .. ':inflight')
local chunk, chunks, deadline, fed = tonumber(meta[2]), tonumber(meta[3]), now_ms() + ARGV[4], {}
local last = math.min(chunks, chunk + 5000)
while chunk < last and room > 0 do
  if redis.call('GETBIT', job .. ':done', chunk) == 0 then
    redis.call('ZADD', job .. ':inflight', deadline, chunk)
    fed[#fed + 1] = chunk
    room = room - 1
  end
  chunk = chunk + 1
end
redis.call('HSET', job, 'next', chunk)
return fed
