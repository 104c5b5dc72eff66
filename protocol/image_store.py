"""The store of generated images: files in Redis under random names, each with a TTL.

Their total size is bounded, by a fixed capacity and by a share of Redis' memory.

One atomic script writes, so that any number of processes agree on the total. It needs two keys beside the
images: a sorted set of names by expiry time, which is also their order of age, and a hash of sizes by name
with the field `total`.
"""

import re
import secrets
from typing import cast

from protocol.connections import RedisClient
from protocol.names import Keys
from protocol.redis_memory import MEMORY_ROOM

_NAME = re.compile(r"[A-Za-z0-9_-]{43}")

# Stores an image and removes what has expired and, where room is needed, what expires first. Returns 1, or 0
# if Redis has no room for the image although all others were removed.
# KEYS: expiry (sorted set), sizes (hash), the image.
# ARGV: name, TTL in ms, capacity in bytes, prefix of image keys, the bytes of the image.
# The keys of removed images are built here, which Redis allows everywhere but in a cluster.
_PUT = (
    MEMORY_ROOM
    + """
local expiry, sizes, image = KEYS[1], KEYS[2], KEYS[3]
local name, ttl, capacity, prefix, png = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local time = redis.call('TIME')
-- microseconds, so that images of the same millisecond keep their order; %.0f, because Lua prints 14 digits only
local now = time[1] * 1000000 + time[2]

local function remove(old)
  redis.call('DEL', prefix .. old)
  redis.call('ZREM', expiry, old)
  local size = redis.call('HGET', sizes, old)
  if size then
    redis.call('HDEL', sizes, old)
    redis.call('HINCRBY', sizes, 'total', -size)
  end
end

remove(name)
for _, old in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', string.format('%.0f', now))) do remove(old) end
while tonumber(redis.call('HGET', sizes, 'total') or 0) + #png > capacity do
  local oldest = redis.call('ZRANGE', expiry, 0, 0)[1]
  if not oldest then break end
  remove(oldest)
end
while (memory_room() or #png) < #png do
  local oldest = redis.call('ZRANGE', expiry, 0, 0)[1]
  if not oldest then return 0 end
  remove(oldest)
end
redis.call('SET', image, png, 'PX', ttl)
redis.call('ZADD', expiry, string.format('%.0f', now + ttl * 1000), name)
redis.call('HSET', sizes, name, #png)
redis.call('HINCRBY', sizes, 'total', #png)
-- both keys must outlive every image in them, also when the TTL was longer before a restart
for _, key in ipairs({expiry, sizes}) do
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, ttl) end
end
return 1
"""
)


class ImageTooLarge(ValueError):
    """Raised by `ImageStore.put` for an image that is larger than the whole store."""


class StoreFull(Exception):
    """Raised by `ImageStore.put` when other data takes the memory that Redis may use."""


def is_name(text: str) -> bool:
    """Return whether `text` has the form of an image's name."""
    return _NAME.fullmatch(text) is not None


class ImageStore:
    """Images by name. `client` must return bytes (no decode_responses).

    Methods raise what the client raises. `put` may be repeated with the same name.
    """

    def __init__(self, client: RedisClient, keys: Keys, ttl_s: float, capacity_bytes: int) -> None:
        self._client = client
        self._keys = keys
        self._ttl_ms = round(ttl_s * 1000)
        self._capacity = capacity_bytes
        self._put = client.register_script(_PUT)

    @staticmethod
    def new_name() -> str:
        """Return a name that can't be guessed: 43 characters of A-Z a-z 0-9 _ -."""
        return secrets.token_urlsafe(32)

    def put(self, name: str, png: bytes, ttl_s: float | None = None) -> None:
        """Store an image, removing those that expire first when there is no room.

        `ttl_s`: seconds for which it is kept, None: those of the store. Raises ImageTooLarge, StoreFull, and
        ValueError for a name that `new_name` can't have made.
        """
        if not is_name(name):
            raise ValueError("not an image's name: make one with new_name()")
        if len(png) > self._capacity:
            raise ImageTooLarge(
                f"an image of {len(png)} bytes in a store of {self._capacity} (IMAGE_STORE_MB)"
            )
        keys = self._keys
        ttl_ms = self._ttl_ms if ttl_s is None else round(ttl_s * 1000)
        stored = self._put(
            keys=[keys.image_expiry, keys.image_sizes, keys.image(name)],
            args=[name, ttl_ms, self._capacity, keys.image(""), png],
        )
        if not stored:
            raise StoreFull(f"Redis is too near to its maxmemory for an image of {len(png)} bytes")

    def size(self, name: str) -> int | None:
        """Return the bytes of an image, or None as `get` does."""
        if not is_name(name):
            return None
        return self._client.strlen(self._keys.image(name)) or None

    def read(self, name: str, start: int, length: int) -> bytes | None:
        """Return `length` bytes of an image from `start`, all within its size, or None as `get` does."""
        if not is_name(name):
            return None
        return cast("bytes", self._client.getrange(self._keys.image(name), start, start + length - 1)) or None

    def get(self, name: str) -> bytes | None:
        """Return the image, or None when it has expired, was removed for newer ones or never existed."""
        if not is_name(name):
            return None
        return cast("bytes | None", self._client.get(self._keys.image(name)))
