"""Elects one of several processes, by a lease in Redis."""

import uuid
from enum import Enum

from protocol.connections import RedisClient

# KEYS: the lease. ARGV: the candidate's id, TTL in milliseconds. Returns 1 if the candidate holds it: only
# its holder may prolong a lease, since another process may have won it while this one was paused.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: the lease. ARGV: the candidate's id. Deletes the lease if the candidate holds it.
_RESIGN = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class Result(Enum):
    """What `Election.hold` found."""

    KEPT = "kept"
    """This process held the lease without a gap since its last call."""
    WON = "won"
    """The lease was free: the first time, or because this process was paused or Redis lost its data."""
    OTHER = "other"
    """Another process holds the lease."""


class Election:
    """A candidate for the lease `key`, which expires `ttl_s` after a `hold`. Methods raise RedisError."""

    def __init__(self, client: RedisClient, key: str, ttl_s: float) -> None:
        self._redis = client
        self._key = key
        self._ttl_ms = int(ttl_s * 1000)
        self._id = uuid.uuid4().hex
        self._renew = client.register_script(_RENEW)
        self._resign = client.register_script(_RESIGN)

    def hold(self) -> Result:
        """Prolong the lease if this process holds it, take it if nobody does."""
        if self._renew(keys=[self._key], args=[self._id, self._ttl_ms]):
            return Result.KEPT
        won = self._redis.set(self._key, self._id, nx=True, px=self._ttl_ms)
        return Result.WON if won else Result.OTHER

    def resign(self) -> None:
        """Let another process take over at once."""
        self._resign(keys=[self._key], args=[self._id])
