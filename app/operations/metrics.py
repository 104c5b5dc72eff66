"""Metrics for Prometheus: each web process answers with those of all web processes and workers of
the deployment."""

import logging
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from redis.exceptions import RedisError

from app.dispatch.worker_view import WorkerView
from app.operations.worker_gauges import worker_gauges
from protocol.errors import WorkerLost
from protocol.leases import Leases
from protocol.metrics import GPU_SECONDS, RUNNING_GPU_SECONDS, MetricStore, Snapshot, give_way, merged
from protocol.queue import JobQueue

log = logging.getLogger(__name__)


class DeploymentMetrics:
    """Renders all that is in Redis: a counter that was read there never goes back, also if another web
    process answers the next scrape.

    Without Redis there is `redis_up` alone. What this process counts meanwhile is shown later.
    """

    def __init__(
        self,
        models: Sequence[str],
        store: MetricStore,
        leases: Leases,
        queue: JobQueue,
        worker_view: WorkerView,
        *,
        publish: Callable[[], None],
    ) -> None:
        """`models`: names of the catalogue. `publish` writes the metrics of this process."""
        self._models = models
        self._store = store
        self._leases = leases
        self._queue = queue
        self._worker_view = worker_view
        self._publish = publish

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        parts = []
        for metric in self._collect():
            parts.append(generate_latest(_One(metric)))
            give_way()
        return b"".join(parts)

    def _collect(self) -> Iterable[Metric]:
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


class _One(CollectorRegistry):
    """A registry of one metric that has been collected."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


def _end(snapshot: Snapshot) -> None:
    """Take the gauges of a process that is gone out of its snapshot.

    No client received what a lost worker ran.
    """
    lost = snapshot.value(RUNNING_GPU_SECONDS)
    snapshot.families = [family for family in snapshot.families if family.type != "gauge"]
    for family in snapshot.families:
        family.samples = [
            (name, labels, value + lost if (name, labels) == _LOST_GPU_SECONDS else value)
            for name, labels, value in family.samples
        ]


_LOST_GPU_SECONDS = (GPU_SECONDS, {"outcome": WorkerLost.code})
