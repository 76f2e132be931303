-- job, epoch, plan, round, then chunk, rows... -> chunks that were not done before, or -1 stale. Their parts are in
-- storage. Which of their rows failed is asked later (count.lua); until then they count as completed.
local job = job_key(ARGV[1])
if stale(ARGV[2]) or not is_round(job, ARGV[3], ARGV[4]) then return -1 end
local changed = 0
for i = 5, #ARGV, 2 do
  if mark_done(job, ARGV[i], ARGV[i + 1], 0, '') == 1 then
    redis.call('RPUSH', job .. ':uncounted', ARGV[i])
    changed = changed + 1
  end
end
return changed
