-- job, epoch, most in flight, hint ms -> chunks to publish, or false when stale. Looks at a bounded number of chunks.
local job = job_key(ARGV[1])
if stale(ARGV[2]) then return false end
local meta = redis.call('HMGET', job, 'status', 'next', 'chunks')
if meta[1] ~= 'in_progress' then return {} end
local room = ARGV[3] - redis.call('ZCARD', job .. ':inflight')
local chunk, chunks, deadline, fed = tonumber(meta[2]), tonumber(meta[3]), now_ms() + ARGV[4], {}
local steps = 0
while chunk < chunks and room > 0 and steps < 5000 do
  steps = steps + 1
  if redis.call('GETBIT', job .. ':done', chunk) == 1 then
    local open = redis.call('BITPOS', job .. ':done', 0, math.floor(chunk / 8)) -- the next in this byte or after it
    chunk = math.max(chunk + 1, open < 0 and chunks or open)
  else
    -- NX: one that is in flight already (the job was paused meanwhile) is left alone.
    if redis.call('ZADD', job .. ':inflight', 'NX', deadline, chunk) == 1 then
      fed[#fed + 1] = chunk
      room = room - 1
    end
    chunk = chunk + 1
  end
end
redis.call('HSET', job, 'next', math.min(chunk, chunks))
return fed
