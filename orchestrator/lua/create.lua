-- job, spec, output -> 1 created, 0 known already, or the id of another job that is at work on this output
local job = job_key(ARGV[1])
if redis.call('HEXISTS', job, 'status') == 1 then return 0 end
local other = redis.call('HGET', 'blip:outputs', ARGV[3])
if other and other ~= ARGV[1] then
  local status = redis.call('HGET', job_key(other), 'status')
  if status and status ~= 'completed' and status ~= 'failed' and status ~= 'cancelled' then return other end
end
redis.call('HSET', job, 'spec', ARGV[2], 'status', 'validating', 'created_at', now_ms())
redis.call('HSET', 'blip:outputs', ARGV[3], ARGV[1])
redis.call('ZADD', 'blip:jobs', now_ms(), ARGV[1])
redis.call('SADD', 'blip:active', ARGV[1])
return 1
