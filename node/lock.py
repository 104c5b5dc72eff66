"""One call to the node at a time, from all processes of a deployment."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.exceptions import LockError, RedisError

from protocol.connections import RedisClient
from protocol.names import Keys

log = logging.getLogger(__name__)

LOCK_TTL_S = 20
"""A lock whose holder was killed is free after this. Longer than the client's patient timeout."""
WAIT_S = 1.0


class NodeLock:
    """A lock in Redis for calls to one node, which handles parallel registrations badly."""

    def __init__(self, client: RedisClient, keys: Keys, node_url: str, service_id: str) -> None:
        self._redis = client
        self._name = keys.node_lock(node_url, service_id)

    @contextmanager
    def turn(self, wait_s: float = WAIT_S) -> Iterator[bool]:
        """Hold the lock; yields False if it was not free within `wait_s` (longer only while Redis stalls).

        Yields True without the lock when Redis can't be reached: calls must go on then, and two at once do
        less harm than none.
        """
        lock = self._redis.lock(self._name, timeout=LOCK_TTL_S, blocking_timeout=wait_s, thread_local=False)
        try:
            acquired = bool(lock.acquire())
        except RedisError as error:
            log.warning("calling the node without its lock, Redis can't be reached: %s", error)
            yield True
            return
        try:
            yield acquired
        finally:
            if acquired:
                self._release(lock)

    def _release(self, lock: "redis.lock.Lock") -> None:
        try:
            lock.release()
        except (LockError, RedisError) as error:
            log.info("the node's lock was not released, it expires: %s", error)
