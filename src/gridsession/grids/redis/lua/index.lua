#!lua flags=allow-oom
-- Corrects an entry of the index of deadlines, unless another has moved it meanwhile.
-- KEYS[1]  one part of the index, a sorted set; the one script whose key is no record
-- ARGV[1]  the record's key    [2] the score it had, as text    [3] its new one, or '' for none
-- Returns  1 corrected, 0 moved meanwhile
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or tonumber(score) ~= tonumber(ARGV[2]) then return 0 end
if ARGV[3] == '' then redis.call('ZREM', KEYS[1], ARGV[1])
else redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1]) end
return 1
