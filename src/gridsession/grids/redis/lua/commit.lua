#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  lock token    [3] commit token    [4] timeout, seconds    [5] '1' and the user, or ''
-- ARGV[6]  '1' to hand the lock on, or '0'    [7] new secret, or ''
-- ARGV[8]  '1' if the user changed with it, or '0'
-- ARGV[9]  '1' if the index has an entry for the deadline that this commit sets, or '0'
-- ARGV[10]  payload; left out, it stays
-- Returns  {OK, counter, deadline}, LOCK_LOST, GONE_OR_MISSING, or {UNINDEXED, deadline}: nothing was
--          done, for the index has to have an earlier entry first
local token, release = ARGV[2], ARGV[6] == '1'
local record = load()
if not record or not is_live(record) then return GONE_OR_MISSING end
local before = known(record, ARGV[3])
if before then
    if release and record[LOCK] == token then
        hand_over(record)
        save(record)
    end
    return before
end
if record[LOCK] ~= token then return LOCK_LOST end
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
if release then hand_over(record) end
save(record, ARGV[10])
return committed(record)
