"""How often one key may ask for work, counted in Redis: all web processes of a deployment agree, by Redis' own clock."""

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
    """Counts with `limits`: a sliding window, judged and counted in one script; its keys lapse after two windows.

    `limit` is RATE_LIMIT ("60/minute"). `reachable` says whether Redis answered lately: while it doesn't, nothing is
    counted, since a request that can't be queued has its own 503 and shall not wait for a second time-out before it.
    """

    def __init__(self, limit: str, client: RedisClient, keys: Keys, *, reachable: Callable[[], bool]) -> None:
        self._text = limit
        self._limit = parse(limit)
        # the web process's own pool: its password, TLS and time-outs hold here, too; the URL is never read
        storage = RedisStorage(
            "redis://", connection_pool=client.connection_pool, key_prefix=f"{keys.prefix}rate"
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._reachable = reachable

    def check(self, caller: str) -> None:
        """Count a request of `caller`. Raises RateLimited; a refused request is not counted."""
        if not self._reachable():
            return
        try:
            if self._limiter.hit(self._limit, caller):
                return
            free_at = self._limiter.get_window_stats(self._limit, caller).reset_time
        except RedisError as error:
            log.warning("requests are not counted against RATE_LIMIT: %s", type(error).__name__)
            return
        raise RateLimited(
            f"this key may send {self._text} requests; try again later",
            retry_after_s=max(1.0, free_at - time.time() + 0.5),
        )
