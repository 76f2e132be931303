-- job, epoch, seconds, slots of a worker, key of the speed in blip:speeds -> 1 measured, 0 too soon, -1 stale.
-- Rows per second as a moving average over `seconds`: of the job, and of one lease for this task and model.
local job, now = job_key(ARGV[1]), now_ms()
if stale(ARGV[2]) then return -1 end
local meta = redis.call('HMGET', job, 'completed', 'failed', 'rate_at', 'rate_rows', 'rate', 'rate_weight')
local rows, live = (meta[1] or 0) + (meta[2] or 0), 0
for _, chunk in ipairs(redis.call('HKEYS', job .. ':leases')) do
  local lease = read_lease(job, chunk)
  if lease.deadline > now then
    rows = rows + lease.rows
    live = live + 1
  end
end
if not meta[3] then
  redis.call('HSET', job, 'progress_at', now, 'rate_at', now, 'rate_rows', rows, 'rate', 0, 'rate_weight', 0)
  return 1
end
local passed = (now - meta[3]) / 1000
if passed < 1 then return 0 end
if rows > tonumber(meta[4]) then redis.call('HSET', job, 'progress_at', now) end
local new, share = math.max(0, rows - meta[4]) / passed, 1 - math.exp(-passed / ARGV[3])
local function average(old) return string.format('%.6f', old * (1 - share) + new * share) end
redis.call('HSET', job, 'rate_at', now, 'rate_rows', rows, 'rate', average(meta[5]),
  'rate_weight', string.format('%.6f', meta[6] * (1 - share) + share))
redis.call('HINCRBYFLOAT', job, 'worker_seconds', string.format('%.3f', passed * live / ARGV[4]))
if live > 0 and new > 0 then
  new = new / live
  redis.call('HSET', 'blip:speeds', ARGV[5], average(redis.call('HGET', 'blip:speeds', ARGV[5]) or new))
end
return 1
