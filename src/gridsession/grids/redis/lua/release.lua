#!lua flags=allow-oom
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  token of a lock or a ticket
-- Returns  OK, LOCK_LOST or GONE_OR_MISSING
local record = load()
if not record or not is_live(record) then return GONE_OR_MISSING end
if record[LOCK] == ARGV[2] then
    slide(record)
    hand_over(record)
else
    local mine, place = ticket_of(record, ARGV[2])
    if not mine then return LOCK_LOST end
    table.remove(record[TICKETS], place)
end
save(record)
return OK
