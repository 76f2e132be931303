-- job, most -> chunk, 1 (its lease ran out) or 0 (never leased), ... of what is overdue, the oldest first
local job, found = job_key(ARGV[1]), {}
for _, chunk in ipairs(redis.call('ZRANGEBYSCORE', job .. ':inflight', '-inf', now_ms(), 'LIMIT', 0, ARGV[2])) do
  found[#found + 1] = chunk
  found[#found + 1] = redis.call('HEXISTS', job .. ':leases', chunk)
end
return found
