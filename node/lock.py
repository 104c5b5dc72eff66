"""Takes turns at the node: one call at a time from all processes of a deployment on one machine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.exceptions import LockError, RedisError

from protocol.connections import RedisClient
from protocol.names import Keys

log = logging.getLogger(__name__)

HOLD_S = 20
"""A holder that died gives its turn back after this. Above a call that takes PATIENT_TIMEOUT_S."""
WAIT_S = 1.0


class NodeLock:
    """The node is told things one after another, or its list is saved twice at once. A courtesy, never a condition."""

    def __init__(self, client: RedisClient, keys: Keys, node_url: str, service_id: str) -> None:
        self._redis = client
        self._name = keys.node_lock(node_url, service_id)

    @contextmanager
    def turn(self, wait_s: float = WAIT_S) -> Iterator[bool]:
        """Whether it is our turn, after waiting `wait_s` at most (longer only while Redis itself stalls).

        True also when Redis can't be reached: the node must be told even then, and a register that meets another
        does less harm than none.
        """
        lock = self._redis.lock(self._name, timeout=HOLD_S, blocking_timeout=wait_s, thread_local=False)
        try:
            mine = bool(lock.acquire())
        except RedisError as error:
            log.warning("calling the node out of turn, Redis can't be reached: %s", error)
            yield True
            return
        try:
            yield mine
        finally:
            if mine:
                self._give_back(lock)

    def _give_back(self, lock: "redis.lock.Lock") -> None:
        try:
            lock.release()
        except (LockError, RedisError) as error:
            log.info("the turn at the node was not given back, it ends by itself: %s", error)
