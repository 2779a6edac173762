#!lua flags=allow-oom
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  lock token    [3] lease, seconds
-- Returns  OK, or LOCK_LOST
local record = load()
if not record or record[LOCK] ~= ARGV[2] or not is_live(record) then return LOCK_LOST end
record[LEASE] = tonumber(ARGV[3])
record[UNTIL] = now + record[LEASE]
save(record)
return OK
