-- seconds[, worker, info] -> id, info, ... of workers seen within them; with a worker: notes that it was seen
local now = now_ms()
if ARGV[2] then
  redis.call('ZADD', 'blip:workers', now, ARGV[2])
  redis.call('HSET', 'blip:workers:info', ARGV[2], ARGV[3])
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', 'blip:workers', '-inf', now - 3600000)) do
    redis.call('ZREM', 'blip:workers', old)
    redis.call('HDEL', 'blip:workers:info', old)
  end
  return {}
end
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'blip:workers', now - ARGV[1] * 1000, '+inf')) do
  found[#found + 1] = id
  found[#found + 1] = redis.call('HGET', 'blip:workers:info', id)
end
return found
