"""Which workers an operator has put under drain: they serve nothing until they are resumed.

A mark outlives the worker, so that one which is restarted for maintenance waits until it is resumed. The name
is Celery's and not the cid: that changes with the GPU.
"""

from collections.abc import Collection
from typing import Any

from protocol.connections import RedisClient
from protocol.names import Keys


class Drains:
    """Writes and reads the marks. Every method takes one round trip, and raises redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._redis = client
        self._key = keys.drains

    def add(self, names: Collection[str]) -> None:
        """Put workers under drain, by Celery's name (`echo-1@host`); at least one."""
        self._redis.sadd(self._key, *names)

    def remove(self, names: Collection[str]) -> None:
        """Let workers serve again, at least one."""
        self._redis.srem(self._key, *names)

    def includes(self, name: str) -> bool:
        """Whether a worker is under drain."""
        return bool(self._redis.sismember(self._key, name))

    def names(self) -> list[str]:
        """Return the names of all workers under drain, running or not, in alphabetical order."""
        members: Any = self._redis.smembers(self._key)
        return sorted(name.decode() for name in members)
