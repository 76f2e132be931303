-- Put in front of every other script. All time is this server's, in milliseconds: clients' clocks do not matter.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function job_key(id) return 'blip:job:' .. id end

-- True when another control loop has taken over from the one that took `epoch`.
local function stale(epoch) return redis.call('HGET', 'blip:control', 'epoch') ~= epoch end

-- A lease is "fence deadline rows worker".
local function read_lease(job, chunk)
  local text = redis.call('HGET', job .. ':leases', chunk)
  if not text then return nil end
  local fence, deadline, rows, worker = string.match(text, '^(%d+) (%d+) (%d+) (.*)$')
  return {fence = fence, deadline = tonumber(deadline), rows = tonumber(rows), worker = worker}
end

local function write_lease(job, chunk, lease)
  redis.call('HSET', job .. ':leases', chunk,
    string.format('%s %.0f %.0f %s', lease.fence, lease.deadline, lease.rows, lease.worker))
  redis.call('ZADD', job .. ':inflight', lease.deadline, chunk)
end

local function holds(lease, fence, worker)
  return lease and lease.fence == fence and lease.worker == worker
end

-- Takes a dead worker's lease away; the turn it was at (a row or a group), if it went in turns, gets the blame.
local function bury(job, chunk)
  local turn = redis.call('HGET', job .. ':cursor', chunk)
  if turn then redis.call('HINCRBY', job .. ':blame', chunk .. ':' .. turn, 1) end
  redis.call('HDEL', job .. ':cursor', chunk)
  redis.call('HDEL', job .. ':leases', chunk)
end

-- Drops what only a job at work needs.
local function drop_work(job)
  for _, part in ipairs({':inflight', ':leases', ':attempts', ':cursor', ':blame', ':uncounted'}) do
    redis.call('DEL', job .. part)
  end
end

-- Whether the job is at this round of this plan.
local function is_round(job, plan, round)
  local at = redis.call('HMGET', job, 'plan', 'round')
  return at[1] == plan and (at[2] or '0') == round
end

-- Codes of errors are "code=rows,code=rows".
local function count_codes(job, codes)
  for code, rows in string.gmatch(codes, '([%w_]+)=(%d+)') do redis.call('HINCRBY', job .. ':codes', code, rows) end
end

-- Sets a chunk's bit and counts its rows, the first time only.
local function mark_done(job, chunk, completed, failed, codes)
  redis.call('HDEL', job .. ':leases', chunk)
  redis.call('HDEL', job .. ':attempts', chunk)
  redis.call('HDEL', job .. ':cursor', chunk)
  redis.call('ZREM', job .. ':inflight', chunk)
  if redis.call('HGET', job, 'status') == 'completed' then return 0 end -- it has all, and its bits are gone
  if redis.call('SETBIT', job .. ':done', chunk, 1) == 1 then return 0 end
  redis.call('HINCRBY', job, 'chunks_done', 1)
  redis.call('HINCRBY', job, 'completed', completed)
  redis.call('HINCRBY', job, 'failed', failed)
  count_codes(job, codes)
  return 1
end
