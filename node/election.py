"""One of several processes, chosen through a lease in Redis."""

import uuid
from typing import Literal

from protocol.connections import RedisClient

# a lease is only prolonged or given back by its holder: a process that slept must not take what another has won
_RENEW = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
_RESIGN = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"


class Election:
    """Candidate for the lease `key`, which lapses after `ttl_s` unless held again. Methods raise redis.RedisError."""

    def __init__(self, client: RedisClient, key: str, ttl_s: float) -> None:
        self._redis = client
        self._key = key
        self._ttl_ms = int(ttl_s * 1000)
        self._me = uuid.uuid4().hex

    def hold(self) -> Literal["kept", "won", "other"]:
        """Prolong the lease, or take it when nobody has it.

        "won" after a "kept" means that the lease was gone in between: this process slept, or Redis forgot.
        """
        if self._redis.eval(_RENEW, 1, self._key, self._me, str(self._ttl_ms)):
            return "kept"
        return "won" if self._redis.set(self._key, self._me, nx=True, px=self._ttl_ms) else "other"

    def resign(self) -> None:
        """Let another take over at once."""
        self._redis.eval(_RESIGN, 1, self._key, self._me)
