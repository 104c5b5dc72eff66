"""Makes redis-py's connections to Redis, and maps the errors of Redis. No connection is made at import."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import KombuError
from redis._parsers import _HiredisParser
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


class _ReadingParser(_HiredisParser):
    """redis-py's parser, which reads what has arrived where redis-py polls first.

    redis-py looks at its connection before each command and each message. A poll is a turn of gevent's event
    loop and costs web a tenth of a request, while a read that finds nothing is one system call.
    """

    def can_read(self, timeout: float = 0) -> bool:
        """Whether data has arrived within `timeout` seconds.

        Raises redis.ConnectionError if Redis has closed.
        """
        if self._reader.has_data():
            return True
        return bool(self.read_from_socket(timeout=timeout, raise_on_timeout=False))  # type: ignore[no-untyped-call]


def connect_redis(settings: Settings) -> RedisClient:
    """Make a pooled client that never repeats a command, since a write could then happen twice.

    With all MAX_CONNECTIONS in use a command waits for one, at most SOCKET_TIMEOUT_S. Without a bound each
    request of a burst would open its own, and two thousand handshakes at once take longer than the time
    limit.
    """
    pool = redis.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=MAX_CONNECTIONS,
        timeout=SOCKET_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=30,
        parser_class=_ReadingParser,
        # with RESP3 each message of a channel would pass through redis-py's handlers of push messages
        protocol=2,
        # a round trip less for its name and one less for its version, in each new connection
        driver_info=None,
        retry=Retry(NoBackoff(), 0),
    )
    return redis.Redis.from_pool(pool)


def namespace_of(settings: Settings, catalogue: Catalogue) -> str:
    """Return NAMESPACE, by default the project's name."""
    return settings.namespace or catalogue.project
