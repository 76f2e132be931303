-- job, chunk, plan, round, completed, failed, codes -> 1 the first time, else 0. No lease is needed: the part is there.
local job = job_key(ARGV[1])
if not is_round(job, ARGV[3], ARGV[4]) then return 0 end
local new = mark_done(job, ARGV[2], ARGV[5], ARGV[6], ARGV[7])
if new == 1 then redis.call('HINCRBY', 'blip:totals', 'rows_done', ARGV[5] + ARGV[6]) end
return new
