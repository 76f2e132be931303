-- job -> rows finished inside live leases, live leases, hints in flight without a lease
local job, now, rows, live = job_key(ARGV[1]), now_ms(), 0, 0
local leases = redis.call('HKEYS', job .. ':leases')
for _, chunk in ipairs(leases) do
  local lease = read_lease(job, chunk)
  if lease.deadline > now then
    rows = rows + lease.rows
    live = live + 1
  end
end
return {rows, live, redis.call('ZCARD', job .. ':inflight') - #leases}
