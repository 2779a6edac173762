#!lua flags=no-writes
-- What the user of this connection may not do, of all that the grid does. Nothing of it is done.
-- KEYS[1]  the name of a record    ARGV[1]  of a part of the index    [2] of the namespace's flag
-- Returns  the commands that are not permitted, once each
local record, part, flag = KEYS[1], ARGV[1], ARGV[2]
local refused, seen = {}, {}
for _, command in ipairs({
    {'GET', record}, {'GETRANGE', record, '0', '0'}, {'SET', record, ''},
    {'SETRANGE', record, '0', ''}, {'PEXPIREAT', record, '0'},
    {'UNLINK', record}, {'SPUBLISH', record, ''}, {'SSUBSCRIBE', record},
    {'SUNSUBSCRIBE', record}, {'ZADD', part, '0', ''}, {'ZSCORE', part, ''}, {'ZREM', part, ''},
    {'ZRANGE', part, '0', '0', 'BYSCORE'}, {'GET', flag}, {'TIME'}, {'PING'},
    {'EVALSHA', '', '1', record}, {'EVAL', '', '1', part},
}) do
    if not redis.acl_check_cmd(unpack(command)) and not seen[command[1]] then
        seen[command[1]] = true
        refused[#refused + 1] = command[1]
    end
end
return refused
