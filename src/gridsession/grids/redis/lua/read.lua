#!lua flags=no-writes
-- KEYS[1]  the record
-- ARGV[1]  secret    [2] the version that the caller has already; left out, it has none
-- Returns  {GRANTED, snapshot, payload}, REFUSED or GONE_OR_MISSING
local record = load(not ARGV[2])
if not record or not is_live(record) then return GONE_OR_MISSING end
return refusal(record, ARGV[1]) or found(GRANTED, record, ARGV[1], ARGV[2])
