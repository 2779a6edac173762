#!lua flags=allow-oom
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- Returns  OK, or GONE_OR_MISSING
local record = load()
if not record or not is_live(record) then return GONE_OR_MISSING end
slide(record)
save(record)
return OK
