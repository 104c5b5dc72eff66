"""A share of Redis' memory that images leave to everything else.

When Redis reaches its `maxmemory` it refuses all writes, those of chats too. Images are by far the largest
values, so the scripts that write them stop earlier.
"""

IMAGE_SHARE = 0.75
"""Images are written only while all that Redis holds stays below this share of `maxmemory`."""

MEMORY_ROOM = f"""
-- Returns the bytes that may still be written for images; nil where Redis has no limit, or where the user of
-- this connection may not run INFO.
local function memory_room()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then return nil end
  local limit = tonumber(string.match(info, 'maxmemory:(%d+)') or 0)
  if limit == 0 then return nil end
  return limit * {IMAGE_SHARE} - tonumber(string.match(info, 'used_memory:(%d+)'))
end
"""
"""Lua function for the beginning of a script."""
