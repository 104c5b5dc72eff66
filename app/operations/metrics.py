"""Metrics for Prometheus: the responses of all web processes of this gunicorn, and the view of the workers."""

import time
from collections.abc import Iterable
from pathlib import Path

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.dispatch.worker_view import WorkerView
from app.http.access_log import current_access
from protocol.event_router import EventRouter


class Metrics:
    """Counts the responses of this process, and renders those of all.

    `folder`: where the processes share their figures (PROMETHEUS_MULTIPROC_DIR); None: there is only this process.
    """

    def __init__(self, worker_view: WorkerView, router: EventRouter, folder: Path | None) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "http_requests_total",
            "Responses by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until a response's headers were ready, by route.",
            ["route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 30, 60, 120, 180, 300),
            registry=self._registry,
        )
        self._open = Gauge(
            "requests_open",
            "Requests that the web processes wait for.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._router = router
        self._shown = CollectorRegistry()
        self._shown.register(_WorkerCollector(worker_view))
        if folder is None:
            self._shown.register(_Registered(self._registry))
        else:
            MultiProcessCollector(self._shown, str(folder))  # type: ignore[no-untyped-call]

    def init_app(self, app: Flask) -> None:
        """Count the responses of `app`. Call this first, to count those of other hooks too."""
        app.after_request(self._count)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._open.set(len(self._router.inboxes()))
        return generate_latest(self._shown)

    def _count(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "(none)"
        self._requests.labels(route, response.status_code).inc()
        self._seconds.labels(route).observe(time.monotonic() - current_access().began_at)
        return response


class _Registered(Collector):
    """The metrics of another registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()


class _WorkerCollector(Collector):
    """Gauges whose values are read when Prometheus asks for them."""

    def __init__(self, worker_view: WorkerView) -> None:
        self._worker_view = worker_view

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("workers", "Workers by model and state.", labels=["model", "state"])
        running = GaugeMetricFamily(
            "requests_running", "Requests that workers are processing.", labels=["model"]
        )
        states: dict[tuple[str, str], int] = {}
        load: dict[str, int] = {}
        for record in self._worker_view.records():
            states[record.model, record.state] = states.get((record.model, record.state), 0) + 1
            if record.state != "lost":
                load[record.model] = load.get(record.model, 0) + record.running
        for (model, state), count in states.items():
            workers.add_metric([model, state], count)
        for model, count in load.items():
            running.add_metric([model], count)
        yield workers
        yield running
        yield GaugeMetricFamily(
            "redis_up", "Whether Redis answered the last time.", value=float(self._worker_view.reachable)
        )
