-- job, epoch or '', new status, error JSON or '', allowed old statuses... -> 1 changed, 0 not from here, -1 stale epoch
local job = job_key(ARGV[1])
if ARGV[2] ~= '' and stale(ARGV[2]) then return -1 end
local status = redis.call('HGET', job, 'status')
for i = 5, #ARGV do
  if status == ARGV[i] then
    redis.call('HSET', job, 'status', ARGV[3], 'error', ARGV[4])
    if ARGV[3] == 'in_progress' then
      redis.call('HSETNX', job, 'in_progress_at', now_ms())
    else
      redis.call('HSET', job, ARGV[3] .. '_at', now_ms())
    end
    if ARGV[3] == 'validating' then redis.call('HDEL', job, 'failed_at', 'cancelled_at', 'completed_at') end
    return 1
  end
end
return 0
