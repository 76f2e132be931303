-- owner, ttl ms -> epoch of the control loop that may write now, or false when another one holds the lead
local now = now_ms()
local held = redis.call('HMGET', 'blip:control', 'owner', 'epoch', 'deadline')
if held[1] and held[1] ~= ARGV[1] and tonumber(held[3]) > now then return false end
local epoch = held[2]
-- A new leader's epoch is new even after Redis lost everything: it starts from the time.
if held[1] ~= ARGV[1] then epoch = string.format('%.0f', math.max(tonumber(held[2] or 0) + 1, now)) end
redis.call('HSET', 'blip:control', 'owner', ARGV[1], 'epoch', epoch, 'deadline', now + ARGV[2])
return epoch
