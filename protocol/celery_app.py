"""Makes the Celery app, which connects to Redis for the queue. No connection is made at import."""

from celery import Celery
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES

from config import Settings
from protocol.connections import SOCKET_TIMEOUT_S
from protocol.names import Keys


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
            # kombu would write each message it receives back to Redis, to deliver it again after a time-out;
            # the request monitor does that, and earlier (docs/adr/0001-threads-pool.md)
            "ack_emulation": False,
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
