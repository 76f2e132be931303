-- job, epoch, plan, then chunk, completed, failed... -> number of chunks that were not done before, or -1 stale
local job = job_key(ARGV[1])
if stale(ARGV[2]) or redis.call('HGET', job, 'plan') ~= ARGV[3] then return -1 end
local changed = 0
for i = 4, #ARGV, 3 do changed = changed + mark_done(job, ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
return changed
