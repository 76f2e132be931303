-- job, weights sha256, info -> 1 same weights as before or the first report, 0 others
local job = job_key(ARGV[1])
if redis.call('EXISTS', job) == 0 then return 1 end -- it ended, and was forgotten
local before = redis.call('HGET', job, 'weights')
if before then return before == ARGV[2] and 1 or 0 end
redis.call('HSET', job, 'weights', ARGV[2], 'model', ARGV[3])
return 1
