#!lua flags=allow-oom
-- Removes the record if it has expired.
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- Returns  '' when there is none (any more), else the second at which to look at it again, as text
local SOON = 0.25  -- seconds
local record = load()
if not record then return '' end
if is_live(record) then
    -- What only its lock keeps is looked at again soon: how long that lives, nobody knows.
    record[INDEXED] = math.max(record[DEADLINE], now + SOON)
    save(record)
    return string.format('%.6f', record[INDEXED])
end
for _, ticket in ipairs(record[TICKETS]) do rung[#rung + 1] = ticket[1] end
redis.call('UNLINK', key)
ring()
return ''
