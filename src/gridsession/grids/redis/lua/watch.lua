#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  ticket's token    [3] secret    [4] holder    [5] queue limit, or ''
-- ARGV[6]  the holding of the lock that was seen first, or ''
-- ARGV[7]  the version that the caller has already; left out, it has none
-- Returns  {GRANTED, snapshot, payload}, {BUSY, …}, {QUEUE_FULL, …}, REFUSED or GONE_OR_MISSING
local token, secret, seen = ARGV[2], ARGV[3], ARGV[6]
local record = load(not ARGV[7])
if not record or not is_live(record) then return GONE_OR_MISSING end
local mine, place = ticket_of(record, token)
if not mine then
    local refused = refusal(record, secret)
    if refused then return refused end
end
if is_locked(record) and (seen == '' or seen == record[LOCK]) then
    if mine then mine[3] = now end
    drop_stale(record)
    local answer = stay(record, mine, token, ARGV[4], tonumber(ARGV[5]), true)
    if answer[1] == BUSY or dropped then save(record) end
    return answer
end
if mine then
    table.remove(record[TICKETS], place)
    save(record)
end
return found(GRANTED, record, secret, ARGV[7])
