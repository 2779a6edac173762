-- The record and the rules of its changes, put in front of each script: `grids/record.py` has the
-- same rules for grids that run in a process, and the contract suite holds both to them.
--
-- KEYS[1]  the record, a hash: `h` its head (cmsgpack), `p` its payload. Its name is also the
--          channel on which those who wait for its lock are rung, with their tokens.
--
-- ARGV[1]  of those that write: for how many seconds the server keeps the record past its end, a
--          minute, or as long as the ends of this namespace's sessions are kept for their handlers
--
-- Times are the server's, in seconds. Commit tokens are 8 bytes, lock tokens 16, secrets 32.

local LAYOUT = 1
local HAND_OFF, POLL, MIN_RETRY = 2.0, 1.0, 0.005
local TICKET, REPLACED, MAX_REPLACED, REMEMBERED = 3.0, 10.0, 4, 8
local MIN_SLIDE, MAX_SLIDE, SLIDE_SHARE = 1.0, 60.0, 0.01

-- What scripts answer with, as their reply or its first part.
local OK, GRANTED, BUSY, QUEUE_FULL, GONE_OR_MISSING, REFUSED, LOCK_LOST, EXISTS, UNINDEXED =
    0, 1, 2, 3, 4, 5, 6, 7, 8

-- The head, an array. What is absent is `false`.
local LAYOUT_, COUNTER, VERSION, CREATED, TIMEOUT, ABSOLUTE, DEADLINE, SECRET, USER = 1, 2, 3, 4, 5, 6, 7, 8, 9
local LOCK, HOLDER, SINCE, UNTIL, TICKETS, COMMITS, OLD, INDEXED = 10, 11, 12, 13, 14, 15, 16, 17
-- A ticket: token, holder, when last heard of, whether it only watches. A commit: token, counter.
-- A replaced secret: secret, until when, whether the user changed.

local key = KEYS[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local rung = {}

local function load()
    local raw = redis.call('HGET', key, 'h')
    if not raw then return nil end
    local record = cmsgpack.unpack(raw)
    if record[LAYOUT_] ~= LAYOUT then
        error({err = 'GSLAYOUT the record is of layout ' .. tostring(record[LAYOUT_])})
    end
    return record
end

local function ring()
    if #rung > 0 then redis.call('SPUBLISH', key, table.concat(rung)) end
end

local function save(record)
    redis.call('HSET', key, 'h', cmsgpack.pack(record))
    local last = math.max(record[DEADLINE], record[LOCK] and record[UNTIL] or 0) + tonumber(ARGV[1])
    redis.call('PEXPIREAT', key, string.format('%.0f', last * 1000))
    ring()
end

local function is_locked(record)
    return record[LOCK] and record[UNTIL] > now
end

-- No session expires while its lock lives.
local function is_live(record)
    return record[DEADLINE] > now or is_locked(record)
end

local function ticket_of(record, token)
    for i, ticket in ipairs(record[TICKETS]) do
        if ticket[1] == token then return ticket, i end
    end
end

local function drop_stale(record)
    local kept = {}
    for _, ticket in ipairs(record[TICKETS]) do
        if ticket[3] >= now - TICKET then kept[#kept + 1] = ticket end
    end
    record[TICKETS] = kept
end

local function lock(record, token, holder, lease)
    record[LOCK], record[HOLDER], record[SINCE], record[UNTIL] = token, holder, now, now + lease
end

-- Give the lock to the first in line, or to nobody; watchers are all let go.
local function hand_over(record)
    record[LOCK] = false
    drop_stale(record)
    local waiting = {}
    for _, ticket in ipairs(record[TICKETS]) do
        if ticket[4] then rung[#rung + 1] = ticket[1] else waiting[#waiting + 1] = ticket end
    end
    local first = table.remove(waiting, 1)
    record[TICKETS] = waiting
    if first then
        lock(record, first[1], first[2], HAND_OFF)
        rung[#rung + 1] = first[1]
    end
end

local function busy(record, token)
    local ahead = 0
    for _, ticket in ipairs(record[TICKETS]) do
        if ticket[1] == token then break end
        if not ticket[4] then ahead = ahead + 1 end
    end
    local retry_in = math.max(math.min(POLL, record[UNTIL] - now), MIN_RETRY)
    return {
        BUSY, record[HOLDER], {double = now - record[SINCE]}, ahead, {double = retry_in},
        record[LOCK]
    }
end

-- Keep the ticket that is there, or enter one.
local function stay(record, mine, token, holder, queue_limit, watch)
    if not mine then
        drop_stale(record)
        if #record[TICKETS] >= queue_limit then
            return {QUEUE_FULL, record[HOLDER], {double = now - record[SINCE]}}
        end
        table.insert(record[TICKETS], {token, holder, now, watch})
    end
    return busy(record, token)
end

-- Whether a secret gives no access, and how: nil when it does.
local function refusal(record, secret)
    if secret == record[SECRET] then return nil end
    for _, old in ipairs(record[OLD]) do
        if old[1] == secret and old[2] > now then
            if old[3] then return REFUSED end
            return nil
        end
    end
    return GONE_OR_MISSING
end

local function deadline_from_now(record)
    local deadline = now + record[TIMEOUT]
    if record[ABSOLUTE] and deadline > record[ABSOLUTE] then return record[ABSOLUTE] end
    return deadline
end

-- A clock that was set back shortens nobody's session.
local function slide(record)
    record[DEADLINE] = math.max(record[DEADLINE], deadline_from_now(record))
end

local function found(code, record, secret)
    local step = math.min(math.max(record[TIMEOUT] * SLIDE_SHARE, MIN_SLIDE), MAX_SLIDE)
    local slide_due = deadline_from_now(record) - record[DEADLINE] > step
    return {
        code, redis.call('HGET', key, 'p'), record[COUNTER], record[VERSION],
        {double = record[CREATED]}, {double = record[TIMEOUT]}, {double = record[DEADLINE]},
        record[USER], secret ~= record[SECRET] and 1 or 0, slide_due and 1 or 0
    }
end

-- What to answer to a commit that had come through before; nil when this one had not.
local function known(record, commit)
    for _, one in ipairs(record[COMMITS]) do
        if one[1] == commit then return {OK, one[2], {double = record[DEADLINE]}} end
    end
end

local function committed(record)
    return {OK, record[COUNTER], {double = record[DEADLINE]}}
end
