-- job, epoch, plan, round, then chunk, completed, failed, codes... -> chunks that were not done before, or -1 stale
local job = job_key(ARGV[1])
if stale(ARGV[2]) or not is_round(job, ARGV[3], ARGV[4]) then return -1 end
local changed = 0
for i = 5, #ARGV, 4 do changed = changed + mark_done(job, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]) end
return changed
