"""A rate limit for each API key, counted in Redis, so that all web processes of a deployment share it."""

import logging
import time
from collections.abc import Callable

from limits import parse
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from protocol.connections import RedisClient
from protocol.errors import RateLimited
from protocol.names import Keys

log = logging.getLogger(__name__)


class RateLimiter:
    """Counts requests in a sliding window, by the `limits` library. The counters expire after two windows."""

    def __init__(self, limit: str, client: RedisClient, keys: Keys, *, reachable: Callable[[], bool]) -> None:
        """`limit` is RATE_LIMIT ("60/minute").

        `reachable` tells whether Redis answered recently. While it does not, nothing is counted: such a
        request gets a 503 from the queue, and counting it would first wait for another timeout.
        """
        self._text = limit
        self._limit = parse(limit)
        # the pool of the web process brings its password, TLS and timeouts; the URL is never read
        storage = RedisStorage(
            "redis://", connection_pool=client.connection_pool, key_prefix=f"{keys.prefix}rate"
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._reachable = reachable

    def check(self, key_name: str) -> None:
        """Count a request that carries this key. Raises RateLimited; a refused request is not counted."""
        if not self._reachable():
            return
        try:
            if self._limiter.hit(self._limit, key_name):
                return
            free_at = self._limiter.get_window_stats(self._limit, key_name).reset_time
        except RedisError as error:
            log.warning("requests are not counted against RATE_LIMIT: %s", type(error).__name__)
            return
        raise RateLimited(
            f"this key may send {self._text} requests; try again later",
            retry_after_s=max(1.0, free_at - time.time() + 0.5),
        )
