"""Metrics for Prometheus: those of all web processes and workers of the deployment, whichever process is asked."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from redis.exceptions import RedisError

from app.dispatch.worker_view import WorkerView
from app.http.access_log import current_access
from app.operations.worker_gauges import worker_gauges
from protocol.errors import WorkerLost
from protocol.event_router import EventRouter
from protocol.leases import Leases
from protocol.metrics import (
    GPU_SECONDS,
    RUNNING_GPU_SECONDS,
    MetricStore,
    Snapshot,
    families_of,
    give_way,
    merged,
)
from protocol.queue import JobQueue

log = logging.getLogger(__name__)

OPEN = "requests_open"


class Metrics:
    """Counts the responses of this process, publishes its metrics, and renders those of all processes.

    `registry` may have others' metrics of this process as well. `models`: names of the catalogue.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        web_id: str,
        models: Sequence[str],
        store: MetricStore,
        leases: Leases,
        queue: JobQueue,
        worker_view: WorkerView,
        router: EventRouter,
    ) -> None:
        self._registry = registry
        self._web_id = web_id
        self._store = store
        self._requests = Counter(
            "http_requests_total", "Responses by route and status.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until a response's headers were ready, by route.",
            ["route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 30, 60, 120, 180, 300),
            registry=registry,
        )
        Gauge(OPEN, "Requests that this web process waits for.", registry=registry).set_function(
            lambda: len(router.inboxes())
        )
        self._deployment = _Deployment(self.publish, models, store, leases, queue, worker_view)

    def init_app(self, app: Flask) -> None:
        """Count the responses of `app`. Call this first, to count those of other hooks too."""
        app.after_request(self._count)

    def publish(self) -> None:
        """Write this process's metrics for the others. Raises redis.RedisError."""
        labels = {"web": self._web_id}
        self._store.write(
            self._web_id, Snapshot(labels=labels, families=families_of(self._registry), web_id=self._web_id)
        )

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        parts = []
        for metric in self._deployment.collect():
            parts.append(generate_latest(_One(metric)))
            give_way()
        return b"".join(parts)

    def _count(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "(none)"
        self._requests.labels(route, response.status_code).inc()
        self._seconds.labels(route).observe(time.monotonic() - current_access().began_at)
        return response


class _One(CollectorRegistry):
    """A registry of one metric that has been collected."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


class _Deployment:
    """All that is in Redis: a counter that was read there never goes back, whichever web process answers the next scrape.

    Without Redis there is `redis_up` alone. What this process counts meanwhile is shown later.
    """

    def __init__(
        self,
        publish: Callable[[], None],
        models: Sequence[str],
        store: MetricStore,
        leases: Leases,
        queue: JobQueue,
        worker_view: WorkerView,
    ) -> None:
        self._publish = publish
        self._models = models
        self._store = store
        self._leases = leases
        self._queue = queue
        self._worker_view = worker_view

    def collect(self) -> Iterable[Metric]:
        found: list[Metric] = []
        reachable = self._worker_view.reachable
        if reachable:
            try:
                found = self._read()
            except RedisError as error:
                log.warning("the metrics can't be read from Redis: %s", error)
                reachable = False
        yield GaugeMetricFamily("redis_up", "Whether Redis answered the last time.", value=float(reachable))
        yield from found

    def _read(self) -> list[Metric]:
        self._publish()
        snapshots = self._store.read_all()
        webs = self._leases.living_webs([snapshot.web_id for snapshot in snapshots if snapshot.web_id])
        records = self._worker_view.records()
        living = {record.incarnation_id for record in records if record.state != "lost"}
        for snapshot in snapshots:
            if snapshot.web_id not in webs and snapshot.incarnation_id not in living:
                _end(snapshot)
        waiting = GaugeMetricFamily(
            "num_requests_waiting", "Admitted requests that no worker has claimed.", labels=["model_name"]
        )
        for model in self._models:
            waiting.add_metric([model], self._queue.waiting(model))
        return [*worker_gauges(records), waiting, *merged(snapshots)]


def _end(snapshot: Snapshot) -> None:
    """Take the gauges of a process that is gone out of its snapshot. What a lost worker ran was for nobody."""
    lost = snapshot.value(RUNNING_GPU_SECONDS)
    snapshot.families = [family for family in snapshot.families if family.type != "gauge"]
    for family in snapshot.families:
        family.samples = [
            (name, labels, value + lost if (name, labels) == _LOST_GPU_SECONDS else value)
            for name, labels, value in family.samples
        ]


_LOST_GPU_SECONDS = (GPU_SECONDS, {"outcome": WorkerLost.code})
