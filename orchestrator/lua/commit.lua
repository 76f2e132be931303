-- job, chunk, plan, completed, failed -> 1 the first time, else 0. No lease is needed: the part is in storage.
local job = job_key(ARGV[1])
if redis.call('HGET', job, 'plan') ~= ARGV[3] then return 0 end
return mark_done(job, ARGV[2], ARGV[4], ARGV[5])
