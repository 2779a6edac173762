#!lua flags=no-writes
-- KEYS[1]  the record
-- ARGV[1]  secret
-- Returns  {GRANTED, snapshot, payload}, REFUSED or GONE_OR_MISSING
local record = load(true)
if not record or not is_live(record) then return GONE_OR_MISSING end
return refusal(record, ARGV[1]) or found(GRANTED, record, ARGV[1])
