#!lua
-- KEYS[1]  the record    ARGV[1]  see record.lua
-- ARGV[2]  lock token    [3] secret    [4] holder    [5] lease, seconds    [6] queue limit, or ''
-- ARGV[7]  the version that the caller has already; left out, it has none
-- Returns  {GRANTED, snapshot, payload}, {BUSY, …}, {QUEUE_FULL, …}, REFUSED or GONE_OR_MISSING
local token, secret = ARGV[2], ARGV[3]
local record = load(not ARGV[7])
if not record or not is_live(record) then return GONE_OR_MISSING end
if record[LOCK] ~= token then
    local mine = ticket_of(record, token)
    -- A ticket was entered with a secret that was good then. It outlasts the few seconds for which
    -- a replaced secret is remembered: waiting may take longer.
    if not mine then
        local refused = refusal(record, secret)
        if refused then return refused end
    end
    if record[LOCK] or #record[TICKETS] > 0 then
        -- Before anything is handed over, or we might be passed over as stale.
        if mine then mine[3] = now end
        local first = false
        if not is_locked(record) then  -- never held, or its holder died, or did not confirm
            drop_stale(record)
            first = not mine
            for _, ticket in ipairs(record[TICKETS]) do
                if not ticket[4] then first = false end
            end
            if not first then hand_over(record) end
        end
        if not first and record[LOCK] ~= token then
            local answer = stay(record, mine, token, ARGV[4], tonumber(ARGV[6]), false)
            if answer[1] == BUSY or dropped or #rung > 0 then save(record) end
            return answer
        end
    end
    if record[LOCK] ~= token then lock(record, token, ARGV[4], 0) end  -- it was free
end
record[LEASE] = tonumber(ARGV[5])
record[UNTIL] = now + record[LEASE]
slide(record)
save(record)
return found(GRANTED, record, secret, ARGV[7])
