#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  secret    [3] commit token    [4] timeout, seconds    [5] '1' and the user, or ''
-- ARGV[6]  the version that it is based on    [7] new secret, or ''
-- ARGV[8]  '1' if the user changed with it, or '0'
-- ARGV[9]  '1' if the index has an entry for the deadline that this commit sets, or '0'
-- ARGV[10]  payload; left out, it stays
-- Returns  {OK, counter, deadline, microseconds until then}, {CONFLICT, snapshot, payload}, LOCKED,
--          REFUSED, GONE_OR_MISSING, or {UNINDEXED, deadline}: nothing was done, for the index has to
--          have an earlier entry first
local secret = ARGV[2]
local record = load()
if not record or not is_live(record) then return GONE_OR_MISSING end
local answer = known(record, ARGV[3]) or refusal(record, secret)
if answer then return answer end
if is_locked(record) then return LOCKED end
local lapsed = record[LOCK] or #record[TICKETS] > 0
if lapsed then
    hand_over(record)
    if record[LOCK] then
        save(record)
        return LOCKED
    end
end
if ARGV[6] ~= string.sub(record[COMMITS], -8) .. record[COUNTER] then
    if lapsed then save(record) end
    return found(CONFLICT, record, secret)
end
local unindexed = apply(record)
if unindexed then return unindexed end
save(record, ARGV[10])
return committed(record, record[COUNTER])
