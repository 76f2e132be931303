-- job, epoch, plan, chunks, rows, round -> 1, or -1 stale. Forgets all work; parts in storage bring it back (mark.lua).
-- In a round after the first all chunks count as done, until those of the round are opened (open.lua).
local job, later = job_key(ARGV[1]), ARGV[6] ~= '0'
if stale(ARGV[2]) then return -1 end
drop_work(job)
redis.call('DEL', job .. ':done', job .. ':codes')
if later then redis.call('SET', job .. ':done', string.rep('\255', math.ceil(ARGV[4] / 8))) end
redis.call('HSET', job, 'plan', ARGV[3], 'chunks', ARGV[4], 'total', ARGV[5], 'round', ARGV[6], 'next', 0,
  'chunks_done', later and ARGV[4] or 0, 'completed', later and ARGV[5] or 0, 'failed', 0)
return 1
