-- job, epoch, plan, round, then chunk, failed, codes... -> 1, or -1 stale. Failed rows of restored chunks (restore.lua),
-- in their order; one that is not the next was counted already.
local job = job_key(ARGV[1])
if stale(ARGV[2]) or not is_round(job, ARGV[3], ARGV[4]) then return -1 end
for i = 5, #ARGV, 3 do
  if redis.call('LINDEX', job .. ':uncounted', 0) == ARGV[i] then
    redis.call('LPOP', job .. ':uncounted')
    redis.call('HINCRBY', job, 'completed', 0 - ARGV[i + 1]) -- Redis takes no "-0"
    redis.call('HINCRBY', job, 'failed', ARGV[i + 1])
    count_codes(job, ARGV[i + 2])
  end
end
return 1
