#!lua flags=allow-oom
-- KEYS[1]  the record
-- ARGV[1]  lock token that the record must bear, or ''
-- Returns  OK, LOCK_LOST or GONE_OR_MISSING
local record = load()
if not record or not is_live(record) then return GONE_OR_MISSING end
if ARGV[1] ~= '' and record[LOCK] ~= ARGV[1] then return LOCK_LOST end
for _, ticket in ipairs(record[TICKETS]) do rung[#rung + 1] = ticket[1] end
redis.call('UNLINK', key)
ring()
return OK
