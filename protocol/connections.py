"""Makes the connections to Redis: redis-py for our keys, Celery for the queue. None is made at import."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from celery import Celery
from kombu import Queue
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from catalogue import TASKS, Catalogue
from config import Settings
from protocol.errors import QueueUnavailable
from protocol.names import Keys

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


def visibility_timeout_s(settings: Settings) -> int:
    """Return after how many seconds kombu delivers an unacknowledged task again: above every deadline."""
    return int(max(task.deadline_s(settings) for task in TASKS.values())) + 60


def create_celery(settings: Settings, keys: Keys) -> Celery:
    """Make the Celery app of web (which only sends), of workers and of Flower.

    docs/adr/0001-threads-pool.md says what breaks without the settings for acknowledging, retries and
    time-outs.
    """
    # registered under the URL's own schemes, so that TLS options and log lines stay as they are
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "protocol.kombu_redis:ReconnectingTransport"))
    app = Celery("modelservice", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        broker_transport_options={
            "global_keyprefix": keys.prefix,
            "visibility_timeout": visibility_timeout_s(settings),
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": SOCKET_TIMEOUT_S,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_publish_retry=False,
        # only JSON: a pickle from a Redis that others can write to would execute code
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        # without this Celery makes a disabled backend for each thread, and each open stream is one
        result_backend_thread_safe=True,
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_redirect_stdouts=False,
        task_default_queue="unused",
        enable_utc=True,
    )
    return app


def consume(app: Celery, keys: Keys, model: str, concurrency: int) -> None:
    """Make a worker of `app` consume the queue of `model`, `concurrency` tasks at a time."""
    queue = keys.queue(model)
    app.conf.task_queues = [Queue(queue)]
    app.conf.task_default_queue = queue
    app.conf.worker_concurrency = concurrency
