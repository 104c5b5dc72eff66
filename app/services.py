"""The composition root of a web process: every collaborator, made here once and handed to whoever needs it."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from app.dispatch.dispatcher import Dispatcher
from app.dispatch.monitor import RequestMonitor
from app.dispatch.worker_view import WorkerView
from app.http.auth import Gate, Limiter
from app.images.fetch import ImageFetcher
from app.operations.metrics import Metrics
from catalogue import Catalogue
from config import Settings
from node.reconciler import Reconciler, build_reconciler
from protocol.connections import (
    RedisClient,
    connect_redis,
    create_celery,
    namespace_of,
    visibility_timeout_s,
)
from protocol.event_router import EventRouter
from protocol.image_store import ImageStore
from protocol.leases import Leases
from protocol.names import Keys
from protocol.queue import JobQueue

START_S = 5.0


class DrainClock:
    """How long this process has been told to stop. gunicorn clears `alive` of its worker object at SIGTERM."""

    def __init__(self) -> None:
        self.gunicorn_worker: Any = None
        self._since: float | None = None

    def __call__(self) -> float:
        """Seconds since the stop was first seen; 0 while the process is to live."""
        if self.gunicorn_worker is None or self.gunicorn_worker.alive:
            return 0.0
        if self._since is None:
            self._since = time.monotonic()
        return max(time.monotonic() - self._since, 0.001)


@dataclass(frozen=True)
class Services:
    """What routes may use."""

    settings: Settings
    catalogue: Catalogue
    namespace: str
    gate: Gate
    leases: Leases
    worker_view: WorkerView
    dispatcher: Dispatcher
    image_store: ImageStore
    fetcher: ImageFetcher
    metrics: Metrics
    router: EventRouter
    monitor: RequestMonitor
    reconciler: Reconciler | None
    drain_clock: DrainClock
    redis: RedisClient

    def start(self, gunicorn_worker: Any = None) -> None:
        """Begin to listen and to watch. Comes after the fork: threads don't survive one.

        Returns when requests can be served, or after `START_S` without Redis: gunicorn accepts connections from then
        on, and a process that refuses them while its neighbour serves would be chosen by chance.
        """
        self.drain_clock.gunicorn_worker = gunicorn_worker
        self.router.start()
        self.monitor.start()
        if self.reconciler is not None:
            self.reconciler.start()
        give_up_at = time.monotonic() + START_S
        while not self.able() and time.monotonic() < give_up_at:
            time.sleep(0.02)

    def able(self) -> bool:
        """Redis answers and the event channel is heard: a request can be followed to its end."""
        return self.worker_view.reachable and self.router.subscribed.is_set()

    def stop(self) -> None:
        """End the threads; tests and orderly exits use it."""
        if self.reconciler is not None:
            self.reconciler.stop()
        self.monitor.stop()
        self.router.stop()


def build_services(settings: Settings, catalogue: Catalogue) -> Services:
    """Wire everything. Nothing connects yet."""
    namespace = namespace_of(settings, catalogue)
    keys = Keys.of(namespace)
    client = connect_redis(settings)
    web_id = uuid.uuid4().hex
    leases = Leases(client, keys)
    worker_view = WorkerView(leases)
    queue = JobQueue(
        client, keys, create_celery(settings, keys), claim_ttl_s=visibility_timeout_s(settings) + 60
    )
    router = EventRouter(client, keys, web_id)
    drain_clock = DrainClock()
    image_store = ImageStore(
        client, keys, ttl_s=settings.image_ttl_s, capacity_bytes=settings.image_store_mb * 2**20
    )
    return Services(
        settings=settings,
        catalogue=catalogue,
        namespace=namespace,
        gate=Gate(settings, _build_limiter(settings, client, keys, worker_view)),
        leases=leases,
        worker_view=worker_view,
        dispatcher=Dispatcher(
            settings,
            catalogue,
            web_id=web_id,
            queue=queue,
            router=router,
            worker_view=worker_view,
            draining_for_s=drain_clock,
        ),
        image_store=image_store,
        fetcher=ImageFetcher(
            allowed_hosts=settings.allowed_image_hosts,
            public_url=settings.public_url,
            read_own=image_store.get,
        ),
        metrics=Metrics(worker_view, router),
        router=router,
        monitor=RequestMonitor(
            client, keys, web_id=web_id, leases=leases, worker_view=worker_view, router=router, queue=queue
        ),
        reconciler=build_reconciler(settings, catalogue, namespace, client, keys, leases),
        drain_clock=drain_clock,
        redis=client,
    )


def _build_limiter(
    settings: Settings, client: RedisClient, keys: Keys, worker_view: WorkerView
) -> Limiter | None:
    if not (settings.rate_limit and settings.api_keys):
        return None
    # here: few deployments have one, and all others start sooner without its library
    from app.http.rate_limit import RateLimiter

    return RateLimiter(settings.rate_limit, client, keys, reachable=lambda: worker_view.reachable)
