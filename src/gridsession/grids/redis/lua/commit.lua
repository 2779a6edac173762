#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  lock token    [3] commit token    [4] timeout, seconds    [5] '1' and the user, or ''
-- ARGV[6]  '1' to hand the lock on, or '0'    [7] new secret, or ''
-- ARGV[8]  '1' if the user changed with it, or '0'
-- ARGV[9]  '1' if the index has an entry for the deadline that this commit sets, or '0'
-- ARGV[10]  payload; left out, it stays
-- Returns  {OK, counter, deadline, microseconds until then}, LOCK_LOST, GONE_OR_MISSING, or
--          {UNINDEXED, deadline}: nothing was done, for the index has to have an earlier entry first
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
local unindexed = apply(record)
if unindexed then return unindexed end
if release then hand_over(record) end
save(record, ARGV[10])
return committed(record, record[COUNTER])
