-- The record and the rules of its changes, put in front of each script: `grids/record.py` has the
-- same rules for grids that run in a process, and the contract suite holds both to them.
--
-- KEYS[1]  the record, a string: a byte, its layout; four bytes, the room for its head; that room,
--          in which the head stands (MessagePack) and may be shorter; the payload. Its name is
--          also the channel on which those who wait for its lock are rung, with their tokens.
--
-- A string and not a hash, whose own parts cost a small session 350 bytes; with room to spare, so
-- that a lock is written without the payload.
--
-- ARGV[1]  of those that write: for how many seconds the server keeps the record past its end, a
--          minute, or as long as the ends of this namespace's sessions are kept for their handlers
--
-- Times are the server's, in seconds. Commit tokens are 8 bytes, lock tokens 16, secrets 32.

local LAYOUT = 1
local HEAD, FIRST = 5, 512  -- bytes ahead of the head; bytes that are read to find it whole
-- Bytes: the head of a session with a lock, a holder and eight commits. With a payload of a whole
-- number of KiB it ends just below the next size that the server's allocator has.
local ROOM, STEP, SPARE = 240, 64, 20
local HAND_OFF, POLL, MIN_RETRY = 2.0, 1.0, 0.005
local TICKET, REPLACED, MAX_REPLACED, REMEMBERED = 3.0, 10.0, 4, 8
local SET_BACK = 1.0
local MIN_SLIDE, MAX_SLIDE, SLIDE_SHARE = 1.0, 60.0, 0.01

-- What scripts answer with, as their reply or its first part.
local OK, GRANTED, BUSY, QUEUE_FULL, GONE_OR_MISSING, REFUSED, LOCK_LOST, EXISTS, UNINDEXED =
    0, 1, 2, 3, 4, 5, 6, 7, 8
local CONFLICT, LOCKED = 9, 10

-- The head, an array. What is absent is `false`.
local COUNTER, COMMITS, CREATED, TIMEOUT, ABSOLUTE, DEADLINE, INDEXED, SECRET = 1, 2, 3, 4, 5, 6, 7, 8
local USER, OLD, LOCK, HOLDER, SINCE, UNTIL, LEASE, TICKETS = 9, 10, 11, 12, 13, 14, 15, 16
-- The last commits' tokens stand one behind the other; the last one's counter is the record's.
-- A ticket: token, holder, when last heard of, whether it only watches, and `true` if it is a
-- commit's, which no limit of the queue counts. A replaced secret: secret, until when, whether the
-- user changed. A version that a caller names: its commit's token, and behind it the counter as text.

local key = KEYS[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local rung = {}
local dropped = false  -- tickets: to be saved, whatever else comes of the call

local room, whole = 0, nil  -- of the record that was loaded; all of it, where it was read whole

-- The record's head. Read whole where its payload will be wanted, too.
local function load(all)
    local raw = all and redis.call('GET', key) or redis.call('GETRANGE', key, 0, FIRST - 1)
    if not raw or raw == '' then return nil end
    if string.byte(raw) ~= LAYOUT then
        error({err = 'GSLAYOUT the record is of layout ' .. string.byte(raw)})
    end
    room = struct.unpack('>I4', raw, 2)
    if all then
        whole = raw
    elseif HEAD + room > #raw then
        raw = redis.call('GETRANGE', key, 0, HEAD + room - 1)
    end
    local _, record = cmsgpack.unpack_one(raw, HEAD)
    return record
end

local function payload()
    if whole then return string.sub(whole, HEAD + room + 1) end
    return redis.call('GETRANGE', key, HEAD + room, -1)
end

local function ring()
    if #rung > 0 then redis.call('SPUBLISH', key, table.concat(rung)) end
end

-- Write the head, and the payload where there is a new one.
local function save(record, new)
    local head = cmsgpack.pack(record)
    local last = math.max(record[DEADLINE], record[LOCK] and record[UNTIL] or 0) + tonumber(ARGV[1])
    last = string.format('%.0f', last * 1000)
    if new or #head > room then
        new = new or payload()
        room, whole = ROOM, nil
        if #head + SPARE > ROOM then room = math.ceil((#head + SPARE) / STEP) * STEP end
        local ahead = struct.pack('>BI4', LAYOUT, room)
        redis.call('SET', key, ahead .. head .. string.rep('\0', room - #head) .. new, 'PXAT', last)
    else
        redis.call('SETRANGE', key, HEAD, head)
        redis.call('PEXPIREAT', key, last)
    end
    ring()
end

-- Whether a time that was so many seconds ahead when it was written is still to come. One that is
-- much further ahead was written before the clock was set back, and has passed. (Less than a second
-- is what those who keep clocks right set one back by.)
local function is_ahead(time, seconds)
    return time > now and time <= now + seconds + SET_BACK
end

local function is_locked(record)
    return record[LOCK] and is_ahead(record[UNTIL], record[LEASE])
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
        if is_ahead(ticket[3] + TICKET, TICKET) then kept[#kept + 1] = ticket end
    end
    dropped = dropped or #kept < #record[TICKETS]
    record[TICKETS] = kept
end

local function lock(record, token, holder, lease)
    record[LOCK], record[HOLDER], record[SINCE] = token, holder, now
    record[UNTIL], record[LEASE] = now + lease, lease
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
        BUSY, record[HOLDER], {double = math.max(0, now - record[SINCE])}, ahead, {double = retry_in},
        record[LOCK]
    }
end

-- Keep the ticket that is there, or enter one; without a limit where that is nil.
local function stay(record, mine, token, holder, queue_limit, watch)
    if not mine then
        drop_stale(record)
        local counted = 0
        for _, ticket in ipairs(record[TICKETS]) do
            if not ticket[5] then counted = counted + 1 end
        end
        if queue_limit and counted >= queue_limit then
            return {QUEUE_FULL, record[HOLDER], {double = math.max(0, now - record[SINCE])}}
        end
        table.insert(record[TICKETS], {token, holder, now, watch, not queue_limit or nil})
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

-- Where the caller has named the version that it has already, and it is this one, the payload is left
-- out.
local function found(code, record, secret, has)
    local step = math.min(math.max(record[TIMEOUT] * SLIDE_SHARE, MIN_SLIDE), MAX_SLIDE)
    local slide_due = deadline_from_now(record) - record[DEADLINE] > step
    local version = string.sub(record[COMMITS], -8)
    return {
        code, (not has or has ~= version .. record[COUNTER]) and payload(), record[COUNTER], version,
        {double = record[CREATED]}, {double = record[TIMEOUT]}, {double = record[DEADLINE]},
        (record[DEADLINE] - now) * 1e6, record[USER], secret ~= record[SECRET] and 1 or 0,
        slide_due and 1 or 0
    }
end

local function committed(record, counter)
    return {OK, counter, {double = record[DEADLINE]}, (record[DEADLINE] - now) * 1e6}
end

-- What to answer to a commit that had come through before; nil when this one had not.
local function known(record, commit)
    local tokens = record[COMMITS]
    for at = #tokens - 7, 1, -8 do
        if string.sub(tokens, at, at + 7) == commit then
            return committed(record, record[COUNTER] - (#tokens - 7 - at) / 8)
        end
    end
end

-- Do what a commit says by its ARGV[3] to [5] and [7] to [9]. Answers, where nothing was done, for the
-- index has to have an earlier entry first, {UNINDEXED, deadline}.
local function apply(record)
    record[TIMEOUT] = tonumber(ARGV[4])
    local deadline = deadline_from_now(record)
    if deadline < record[INDEXED] then
        if ARGV[9] ~= '1' then return {UNINDEXED, {double = deadline}} end
        record[INDEXED] = deadline
    end
    record[DEADLINE] = deadline
    record[COUNTER] = record[COUNTER] + 1
    record[COMMITS] = string.sub(record[COMMITS] .. ARGV[3], -8 * REMEMBERED)
    record[USER] = ARGV[5] ~= '' and string.sub(ARGV[5], 2)
    if ARGV[7] ~= '' then
        local user_changed = ARGV[8] == '1'
        local old = {}
        for _, one in ipairs(record[OLD]) do
            if one[2] > now then old[#old + 1] = {one[1], one[2], one[3] or user_changed} end
        end
        if user_changed then  -- who came with an older id is not let in any more, also from the queue
            for _, ticket in ipairs(record[TICKETS]) do rung[#rung + 1] = ticket[1] end
            record[TICKETS] = {}
        end
        old[#old + 1] = {record[SECRET], now + REPLACED, user_changed}
        if #old > MAX_REPLACED then table.remove(old, 1) end
        record[OLD], record[SECRET] = old, ARGV[7]
    end
end
