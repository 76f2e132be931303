-- job, chunk, fence, worker, lease ms, rows done -> 1, or 0 when the lease is lost or the job is not to go on
local job = job_key(ARGV[1])
local lease = read_lease(job, ARGV[2])
if not holds(lease, ARGV[3], ARGV[4]) or redis.call('HGET', job, 'status') ~= 'in_progress' then return 0 end
lease.deadline = now_ms() + ARGV[5]
lease.rows = tonumber(ARGV[6])
write_lease(job, ARGV[2], lease)
return 1
