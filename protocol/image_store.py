"""The store of finished pictures: bytes in Redis under unguessable names, each with a TTL, never more than a fixed total.

One atomic script writes, so that any number of workers and web processes agree on the total. Two keys beside the pictures
keep the books: `image:#expiry` (sorted set, name to expiry in µs: the order of age, too) and `image:#sizes` (hash, name
to bytes, and the field `total`). A name can't contain `#`.
"""

import re
import secrets
from typing import cast

from protocol.connections import RedisClient

_NAME = re.compile(r"[A-Za-z0-9_-]{43}")

# KEYS: expiry, sizes, the picture. ARGV: name, ttl in ms, capacity in bytes, prefix of picture keys, the picture.
# Keys of evicted pictures are made up here, which Redis allows everywhere but in a cluster.
_PUT = """
local expiry, sizes, picture = KEYS[1], KEYS[2], KEYS[3]
local name, ttl, capacity, prefix, png = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local time = redis.call('TIME')
-- microseconds, so that age decides and not the name; %.0f, because Lua prints 14 digits only
local now = time[1] * 1000000 + time[2]

local function drop(old)
  redis.call('DEL', prefix .. old)
  redis.call('ZREM', expiry, old)
  local size = redis.call('HGET', sizes, old)
  if size then
    redis.call('HDEL', sizes, old)
    redis.call('HINCRBY', sizes, 'total', -size)
  end
end

drop(name)
for _, old in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', string.format('%.0f', now))) do drop(old) end
while tonumber(redis.call('HGET', sizes, 'total') or 0) + #png > capacity do
  local oldest = redis.call('ZRANGE', expiry, 0, 0)[1]
  if not oldest then break end
  drop(oldest)
end
redis.call('SET', picture, png, 'PX', ttl)
redis.call('ZADD', expiry, string.format('%.0f', now + ttl * 1000), name)
redis.call('HSET', sizes, name, #png)
redis.call('HINCRBY', sizes, 'total', #png)
-- the books outlive every picture in them, also when IMAGE_TTL_S was made shorter meanwhile
for _, book in ipairs({expiry, sizes}) do
  if redis.call('PTTL', book) < ttl then redis.call('PEXPIRE', book, ttl) end
end
"""

_DELETE = """
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[1], ARGV[1])
local size = redis.call('HGET', KEYS[2], ARGV[1])
if size then
  redis.call('HDEL', KEYS[2], ARGV[1])
  redis.call('HINCRBY', KEYS[2], 'total', -size)
end
"""


class ImageTooLarge(ValueError):
    """One picture is larger than the whole store."""


def is_name(text: str) -> bool:
    """Whether `text` has the form of a picture's name."""
    return _NAME.fullmatch(text) is not None


class ImageStore:
    """Pictures by name, all with the same TTL. `client` must return bytes (no decode_responses).

    Methods raise what the client raises; `put` and `delete` may be repeated.
    """

    def __init__(self, client: RedisClient, namespace_prefix: str, ttl_s: float, capacity_bytes: int) -> None:
        self._client = client
        self._prefix = f"{namespace_prefix}image:"
        self._ttl_ms = round(ttl_s * 1000)
        self._capacity = capacity_bytes
        self._put = client.register_script(_PUT)
        self._delete = client.register_script(_DELETE)

    @staticmethod
    def new_name() -> str:
        """A name that can't be guessed: 43 characters of A-Z a-z 0-9 _ -."""
        return secrets.token_urlsafe(32)

    def put(self, name: str, png: bytes) -> None:
        """Keep a picture; the oldest ones go when there is no room. Raises ImageTooLarge."""
        if len(png) > self._capacity:
            raise ImageTooLarge(
                f"a picture of {len(png)} bytes in a store of {self._capacity} (IMAGE_STORE_MB)"
            )
        self._put(keys=self._keys(name), args=[name, self._ttl_ms, self._capacity, self._prefix, png])

    def get(self, name: str) -> bytes | None:
        """The picture, or None when it expired, made room for others or never was."""
        if not is_name(name):
            return None
        return cast("bytes | None", self._client.get(self._prefix + name))

    def delete(self, name: str) -> None:
        """Forget a picture; unknown names are ignored."""
        self._delete(keys=self._keys(name), args=[name])

    def _keys(self, name: str) -> list[str]:
        if not is_name(name):
            raise ValueError("not a picture's name: make one with new_name()")
        return [f"{self._prefix}#expiry", f"{self._prefix}#sizes", f"{self._prefix}{name}"]
