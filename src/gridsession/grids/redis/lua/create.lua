#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  commit token    [3] secret    [4] payload    [5] timeout, seconds
-- ARGV[6]  absolute timeout, seconds, or ''    [7] '1' and the user, or ''
-- ARGV[8]  lock token, or ''    [9] holder    [10] lease, seconds
-- ARGV[11] the second that the index has for it
-- Returns  {OK, counter, deadline, microseconds until then}, or EXISTS
local there = load()
if there and is_live(there) then
    return known(there, ARGV[2]) or EXISTS
end
if there then
    for _, ticket in ipairs(there[TICKETS]) do rung[#rung + 1] = ticket[1] end
end
local absolute = ARGV[6] ~= '' and now + tonumber(ARGV[6])
local record = {
    1, ARGV[2], now, tonumber(ARGV[5]), absolute, 0, tonumber(ARGV[11]), ARGV[3],
    ARGV[7] ~= '' and string.sub(ARGV[7], 2), {}, false, '', 0, 0, 0, {}
}
record[DEADLINE] = deadline_from_now(record)
if ARGV[8] ~= '' then lock(record, ARGV[8], ARGV[9], tonumber(ARGV[10])) end
save(record, ARGV[4])
return committed(record, 1)
