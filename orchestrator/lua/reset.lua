-- job, epoch, plan, chunks, rows -> 1, or -1 stale. Forgets all work; parts in storage bring it back (mark.lua).
local job = job_key(ARGV[1])
if stale(ARGV[2]) then return -1 end
for _, part in ipairs({':done', ':inflight', ':leases', ':attempts', ':cursor', ':blame'}) do
  redis.call('DEL', job .. part)
end
redis.call('HSET', job, 'plan', ARGV[3], 'chunks', ARGV[4], 'total', ARGV[5], 'next', 0,
  'chunks_done', 0, 'completed', 0, 'failed', 0)
return 1
