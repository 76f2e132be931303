-- job, chunk, plan, round, worker, lease ms -> {'gone'}, {'done'}, {'busy'} or {'leased', fence, attempt}
local job, chunk = job_key(ARGV[1]), ARGV[2]
local meta = redis.call('HMGET', job, 'status', 'plan', 'fence', 'round')
if meta[1] ~= 'in_progress' or meta[2] ~= ARGV[3] or (meta[4] or '0') ~= ARGV[4] then return {'gone'} end
if redis.call('GETBIT', job .. ':done', chunk) == 1 then return {'done'} end
local now = now_ms()
local lease = read_lease(job, chunk)
if lease and lease.deadline > now then return {'busy'} end
if lease then bury(job, chunk) end
-- Fences start from the time, so that none repeats after Redis lost everything.
local fence = string.format('%.0f', math.max(tonumber(meta[3] or 0) + 1, now))
redis.call('HSET', job, 'fence', fence)
write_lease(job, chunk, {fence = fence, deadline = now + ARGV[6], rows = 0, worker = ARGV[5]})
return {'leased', fence, redis.call('HINCRBY', job .. ':attempts', chunk, 1)}
