-- job -> the workers that hold its live leases, one entry for each lease
local job, now, found = job_key(ARGV[1]), now_ms(), {}
for _, chunk in ipairs(redis.call('HKEYS', job .. ':leases')) do
  local lease = read_lease(job, chunk)
  if lease.deadline > now then found[#found + 1] = lease.worker end
end
return found
