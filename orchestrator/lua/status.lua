-- job, epoch or '', new status, error JSON or '', allowed old statuses... -> 1 changed, 0 not from here, -1 stale epoch
local job, new = job_key(ARGV[1]), ARGV[3]
if ARGV[2] ~= '' and stale(ARGV[2]) then return -1 end
local status = redis.call('HGET', job, 'status')
local allowed = false
for i = 5, #ARGV do allowed = allowed or status == ARGV[i] end
if not allowed then return 0 end

-- Hints of a paused job were dropped: what nobody holds is handed out again.
if new == 'in_progress' and status == 'paused' then
  local now = now_ms()
  for _, chunk in ipairs(redis.call('ZRANGE', job .. ':inflight', 0, -1)) do
    local lease = read_lease(job, chunk)
    if not lease or lease.deadline <= now then
      bury(job, chunk)
      redis.call('ZREM', job .. ':inflight', chunk)
    end
  end
  redis.call('HSET', job, 'next', 0)
end

redis.call('HSET', job, 'status', new, 'error', ARGV[4])
redis.call('HDEL', job, 'rate_at', 'rate_rows', 'rate', 'rate_weight')
if new == 'validating' then -- it begins again
  redis.call('HDEL', job, 'in_progress_at', 'restored', 'finalizing_at', 'failed_at', 'cancelled_at', 'completed_at')
elseif new == 'in_progress' then
  local rows = redis.call('HMGET', job, 'completed', 'failed')
  redis.call('HSETNX', job, 'in_progress_at', now_ms())
  redis.call('HSETNX', job, 'restored', rows[1] + rows[2])
else
  redis.call('HSET', job, new .. '_at', now_ms())
end
if new == 'completed' or new == 'failed' or new == 'cancelled' then
  redis.call('SREM', 'blip:active', ARGV[1])
  drop_work(job)
  -- Of one that stopped, late parts may still be counted, once.
  if new == 'completed' then redis.call('DEL', job .. ':done') end
else
  redis.call('SADD', 'blip:active', ARGV[1])
end
return 1
