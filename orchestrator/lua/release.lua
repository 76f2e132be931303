-- job, chunk, fence, worker, hint ms -> 1, or 0 when the lease was lost. The attempt does not count.
local job = job_key(ARGV[1])
if not holds(read_lease(job, ARGV[2]), ARGV[3], ARGV[4]) then return 0 end
redis.call('HDEL', job .. ':leases', ARGV[2])
redis.call('HDEL', job .. ':cursor', ARGV[2])
redis.call('HINCRBY', job .. ':attempts', ARGV[2], -1)
redis.call('ZADD', job .. ':inflight', now_ms() + ARGV[5], ARGV[2])
return 1
