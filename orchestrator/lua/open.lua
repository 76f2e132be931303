-- job, epoch, plan, round, then chunk, rows... -> chunks that were closed, or -1 stale. Rows of these chunks are to be
-- done again: they count neither as completed nor as failed until the round has a part of the chunk.
local job, opened = job_key(ARGV[1]), 0
if stale(ARGV[2]) or not is_round(job, ARGV[3], ARGV[4]) then return -1 end
for i = 5, #ARGV, 2 do
  if redis.call('SETBIT', job .. ':done', ARGV[i], 0) == 1 then
    redis.call('HINCRBY', job, 'chunks_done', -1)
    redis.call('HINCRBY', job, 'completed', -ARGV[i + 1])
    opened = opened + 1
  end
end
return opened
