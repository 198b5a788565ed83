-- What replicas share of their limits: one call tells what this replica has taken, and asks for more.
--
-- KEYS[1]   who lives: replica -> "number of its last call, when it came"; since when this is known; and when the
--           store woke, if it was away
-- KEYS[2..] the levels, each a hash:
--   w, t          the span that is counted: from, to (milliseconds since 1970)
--   h:<replica>   what it has taken in that span: "used held"
--   p:<replica>   the same of the span before
--   n             the highest threshold of which somebody was told, in per cent, and the replica that tells it
-- ARGV[1]   the call, as JSON (gateway/limits/shared.rs, `Call`)
--
-- What is used counts whoever used it; what is held counts while its replica lives. A replica tells absolute numbers,
-- so a call that is lost, or that comes twice or late, leaves nothing behind once the next one has come.

local call = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local me = call.me

local function whole(number)
  return string.format('%.0f', number)
end

local function pair(text)
  local used, held = string.match(text, '^(%d+) (%d+)$')
  return { tonumber(used) or 0, tonumber(held) or 0 }
end

local last = redis.call('HGET', KEYS[1], me)
if last and pair(last)[1] >= call.number then
  return { -1 }
end

-- When each was heard last.
local heard, since, woke, newest = {}, now, 0, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at = pair(all[i + 1])[2]
  if all[i] == 'since' then
    since = at
  elseif all[i] == 'woke' then
    woke = at
  else
    heard[all[i]] = at
    newest = math.max(newest, at)
  end
end
-- Where nobody at all was heard, it is the store that was away: whoever lives has had no chance to say so.
if newest > 0 and now - newest >= call.dead_ms / 2 then
  woke = now
  redis.call('HSET', KEYS[1], 'woke', '0 ' .. whole(now))
end
heard[me] = now
redis.call('HSET', KEYS[1], me, whole(call.number) .. ' ' .. whole(now))
redis.call('HSETNX', KEYS[1], 'since', '0 ' .. whole(now))
redis.call('PEXPIRE', KEYS[1], 10 * call.forget_ms)

-- true: lives; false: has been silent, and what it holds does not count.
local known = {}
for replica, at in pairs(heard) do
  if now - math.max(at, woke) < call.dead_ms then
    known[replica] = true
  elseif now - at < call.forget_ms then
    known[replica] = false
  else
    redis.call('HDEL', KEYS[1], replica)
  end
end

local function sum(taken)
  local total = 0
  for replica, of in pairs(taken) do
    total = total + of[1]
    if known[replica] then
      total = total + of[2]
    end
  end
  return total
end

-- Reads a level and goes on to the span that the call is in.
local function read(key, told)
  local level = { here = {}, past = {} }
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    local field, text = flat[i], flat[i + 1]
    local kind, replica = string.sub(field, 1, 2), string.sub(field, 3)
    if field == 'w' then
      level.from = tonumber(text)
    elseif field == 't' then
      level.to = tonumber(text)
    elseif field == 'n' then
      local percent, teller = string.match(text, '^(%d+) (.+)$')
      level.percent, level.teller = tonumber(percent) or 0, teller
    elseif kind == 'p:' then
      level.past[replica] = pair(text)
    else
      local of = pair(text)
      -- Those who are long gone become one; not if nobody can be known to be.
      local is_gone = known[replica] == nil and now - since >= call.forget_ms
      if is_gone and replica ~= 'gone' then
        level.gone = level.gone or {}
        table.insert(level.gone, field)
      end
      if is_gone or replica == 'gone' then
        local gone = level.here.gone or { 0, 0 }
        level.here.gone = { gone[1] + of[1], 0 }
      else
        level.here[replica] = of
      end
    end
  end
  if not level.from or told.from > level.from then
    level.past = level.to == told.from and level.here or {}
    level.here, level.gone = {}, nil
    level.percent, level.teller = nil, nil
    level.from, level.to = told.from, told.to
    level.fresh = true
  end
  return level
end

-- Puts what the replica says of itself into the level.
local function tell(level, told)
  local own = level.here[me] or { 0, 0 }
  if told.from == level.from then
    own = { told.used, told.held + told.slice }
    level.past[me] = { told.used_before, told.held_before }
    level.slice = told.slice
  elseif told.to == level.from then
    -- Others are in the next span already.
    level.past[me] = { told.used, told.held }
  end
  level.here[me] = own
  level.own = own
  level.taken, level.before = sum(level.here), sum(level.past)
  level.max = told.max
  level.weight = 0
  if told.rolls then
    local length = level.to - level.from
    level.weight = math.max(math.min(level.to - now, length), 0) / length
  end
end

-- A threshold is told by the first replica that has seen it passed. One whose call was lost is told so again.
local function warn(level, told)
  if told.from == level.from and told.warned > (level.percent or 0) then
    level.percent, level.teller, level.news = told.warned, me, true
  end
end

local function free(level)
  return level.max - level.taken - math.ceil(level.before * level.weight)
end

local levels = {}
for i, told in ipairs(call.levels) do
  local level = read(KEYS[i + 1], told)
  tell(level, told)
  warn(level, told)
  levels[i] = level
end

local function take(level, amount)
  level.taken = level.taken + amount
  level.own[2] = level.own[2] + amount
end

-- Each request gets all that it asks for, or nothing.
local answers = {}
for _, request in ipairs(call.requests) do
  local fits = true
  for i = 1, #request, 2 do
    fits = fits and free(levels[request[i]]) >= request[i + 1]
  end
  table.insert(answers, fits and 1 or 0)
  for i = 1, #request, 2 do
    local level = levels[request[i]]
    if fits then
      take(level, request[i + 1])
    end
    table.insert(answers, level.taken)
    table.insert(answers, level.before)
  end
end

local reply = { last and 1 or 0, now }
for i, told in ipairs(call.levels) do
  local level, target = levels[i], 0
  -- A slice grows here, and shrinks only by the word of the replica that may be spending it.
  if told.parts > 0 and level.slice then
    target = math.max(math.floor((free(level) + level.slice) / told.parts), 0)
    if target > level.slice then
      take(level, target - level.slice)
    end
  end
  local past = level.past[me] or { 0, 0 }
  local fields = { 'w', whole(level.from), 't', whole(level.to), 'h:' .. me, whole(level.own[1]) .. ' ' .. whole(level.own[2]) }
  if level.fresh then
    redis.call('DEL', KEYS[i + 1])
    for replica, of in pairs(level.past) do
      table.insert(fields, 'p:' .. replica)
      table.insert(fields, whole(of[1]) .. ' ' .. whole(of[2]))
    end
  elseif past[1] > 0 or past[2] > 0 then
    table.insert(fields, 'p:' .. me)
    table.insert(fields, whole(past[1]) .. ' ' .. whole(past[2]))
  end
  if level.gone then
    redis.call('HDEL', KEYS[i + 1], unpack(level.gone))
    table.insert(fields, 'h:gone')
    table.insert(fields, whole(level.here.gone[1]) .. ' 0')
  end
  if level.news then
    table.insert(fields, 'n')
    table.insert(fields, whole(level.percent) .. ' ' .. me)
  end
  redis.call('HSET', KEYS[i + 1], unpack(fields))
  if told.expire_ms > 0 then
    redis.call('PEXPIRE', KEYS[i + 1], told.expire_ms)
  end
  for _, number in ipairs({
    level.from, level.to, level.taken, level.own[1] + level.own[2], level.before, past[1] + past[2], target,
    level.percent or 0, level.teller == me and 1 or 0,
  }) do
    table.insert(reply, number)
  end
end
for _, number in ipairs(answers) do
  table.insert(reply, number)
end
return reply
