"""Alarms of the supervisors about processes that don't come up, for the web processes of every machine.

They are kept in one sorted set: texts, scored by their expiry (Redis time, seconds). A supervisor writes its
own again and again while they last, so that those of one that has ended expire.
"""

from collections.abc import Collection
from typing import Any

from protocol.connections import RedisClient
from protocol.names import Keys

ALARM_TTL_S = 30


class Alarms:
    """Writes and reads alarms. Every method takes two round trips, and raises redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._redis = client
        self._key = keys.alarms

    def renew(self, texts: Collection[str], ended: Collection[str] = ()) -> None:
        """Keep `texts` for another ALARM_TTL_S, and remove those in `ended`."""
        now = self._now()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(self._key, "-inf", now)
            if ended:
                pipe.zrem(self._key, *ended)
            if texts:
                pipe.zadd(self._key, dict.fromkeys(texts, now + ALARM_TTL_S))
                pipe.expire(self._key, ALARM_TTL_S)
            pipe.execute()

    def current(self) -> list[str]:
        """Return the texts that have not expired, in alphabetical order."""
        found: Any = self._redis.zrangebyscore(self._key, f"({self._now()}", "+inf")
        return sorted(text.decode() for text in found)

    def _now(self) -> int:
        seconds, _ = self._redis.time()
        return int(seconds)
