-- job, chunk, fence, worker, turn -> 1, or 0 when the lease was lost. Notes the turn that is about to begin.
local job = job_key(ARGV[1])
if not holds(read_lease(job, ARGV[2]), ARGV[3], ARGV[4]) then return 0 end
redis.call('HSET', job .. ':cursor', ARGV[2], ARGV[5])
return 1
