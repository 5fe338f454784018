"""Lua scripts of the job queue; KEYS[1] is the stream, ARGV[1] the consumer group."""

ACKNOWLEDGE = """
-- ARGV[2..]: entry ids. Removes them for good, whoever holds them.
local group = table.remove(ARGV, 1)
redis.call('XACK', KEYS[1], group, unpack(ARGV))
return redis.call('XDEL', KEYS[1], unpack(ARGV))
"""

CANCEL = """
-- ARGV[2]: entry id. Deletes the entry unless a consumer holds it; returns 1 if it was deleted.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err and not string.find(pending.err, 'NOGROUP') then return pending end
if #pending > 0 then return 0 end
return redis.call('XDEL', KEYS[1], ARGV[2])
"""

DEPTH = """
-- Returns the number of entries and how many of them a consumer holds.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
if pending.err and not string.find(pending.err, 'NOGROUP') then return pending end
return {redis.call('XLEN', KEYS[1]), pending.err and 0 or pending[1]}
"""

ARRIVALS = """
-- Returns the number of entries ever added to all streams, of those that wait, and newest ids.
local added, waiting, newest = 0, 0, {}
for at, key in ipairs(KEYS) do
  local stream = redis.pcall('XINFO', 'STREAM', key)
  newest[at] = '0-0'
  if stream.err then
    if not string.find(stream.err, 'no such key') then return stream end
  else
    local fields = {}
    for i = 1, #stream, 2 do fields[stream[i]] = stream[i + 1] end
    if not fields['entries-added'] then
      return redis.error_reply('ERR counting entries needs Redis 7.0 or later')
    end
    local pending = redis.pcall('XPENDING', key, ARGV[1])
    if pending.err and not string.find(pending.err, 'NOGROUP') then return pending end
    added = added + fields['entries-added']
    waiting = waiting + fields['length'] - (pending.err and 0 or pending[1])
    newest[at] = fields['last-generated-id']
  end
end
return {added, waiting, newest}
"""

PEEK = """
-- ARGV[2]: most entries. Returns {id, fields} of the first that no consumer was ever given.
local after, groups = '-', redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
  if string.find(groups.err, 'no such key') then return {} end
  return groups
end
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then after = '(' .. fields['last-delivered-id'] end
end
return redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', ARGV[2])
"""

_TAKE_OVER = """
-- Claims one pending entry for ARGV[2]; appends {id, deliveries, fields} to `taken`.
local function take(entry, taken)
  local rows = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1])
  if #rows > 0 then
    table.insert(taken, {entry[1], entry[4] + 1, rows[1][2]})
  else
    redis.call('XACK', KEYS[1], ARGV[1], entry[1])
  end
end
"""

RECLAIM = (
    _TAKE_OVER
    + """
-- ARGV[2]: new consumer, ARGV[3]: most entries, ARGV[4..]: consumers that are alive.
local taken, spared = {}, {[ARGV[2]] = true}
for i = 4, #ARGV do spared[ARGV[i]] = true end
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then
  if string.find(consumers.err, 'NOGROUP') or string.find(consumers.err, 'no such key') then
    return taken
  end
  return consumers
end
for _, consumer in ipairs(consumers) do
  local name, pending = consumer[2], consumer[4]
  local room = tonumber(ARGV[3]) - #taken
  if not spared[name] and (pending == 0 or room > 0) then
    local found = {}
    if pending > 0 then
      found = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', room, name)
    end
    for _, entry in ipairs(found) do take(entry, taken) end
    if #found == pending then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
    end
  end
end
return taken
"""
)

ADOPT = (
    _TAKE_OVER
    + """
-- ARGV[2]: consumer, ARGV[3]: most entries, ARGV[4..]: ids that it knows it holds.
local taken, known = {}, {}
for i = 4, #ARGV do known[ARGV[i]] = true end
local found = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 100000, ARGV[2])
if found.err then
  if string.find(found.err, 'NOGROUP') then return taken end
  return found
end
for _, entry in ipairs(found) do
  if not known[entry[1]] and #taken < tonumber(ARGV[3]) then take(entry, taken) end
end
return taken
"""
)
