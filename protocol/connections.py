"""Makes redis-py's connections to Redis, and maps the errors of Redis. No connection is made at import."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import KombuError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from catalogue import Catalogue
from config import Settings
from protocol.errors import QueueUnavailable

RedisClient = redis.Redis
"""Always without `decode_responses`: answers are bytes."""

SOCKET_TIMEOUT_S = 4.0
"""For connecting, and for each command. A client waits for its 503 at most twice as long."""

MAX_CONNECTIONS = 64

QUEUE_ERRORS = (RedisError, KombuError)
"""What redis-py, and Celery over it, raise when Redis can't be reached or refuses a command."""


@contextmanager
def queue_errors() -> Iterator[None]:
    """Raise QueueUnavailable for the errors of Redis and of Celery, where a client waits."""
    try:
        yield
    except (*QUEUE_ERRORS, OSError) as error:  # kombu lets some errors of its socket through
        raise QueueUnavailable from error


def connect_redis(settings: Settings) -> RedisClient:
    """Make a pooled client that never repeats a command, since a write could then happen twice.

    In a burst commands wait for a connection of the pool. Without a bound each request would open its own,
    and two thousand handshakes at once take longer than the time limit.
    """
    pool = redis.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=MAX_CONNECTIONS,
        timeout=SOCKET_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 0),
    )
    return redis.Redis.from_pool(pool)


def namespace_of(settings: Settings, catalogue: Catalogue) -> str:
    """Return NAMESPACE, by default the project's name."""
    return settings.namespace or catalogue.project
