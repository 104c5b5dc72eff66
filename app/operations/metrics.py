"""Figures for Prometheus: what this web process answered, and what it knows of the workers."""

import time
from collections.abc import Iterable

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.dispatch.worker_view import WorkerView
from protocol.event_router import EventRouter


class Metrics:
    """One registry for each web process; `render` is its text form."""

    def __init__(self, worker_view: WorkerView, router: EventRouter) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "http_requests_total",
            "Answers by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until the answer's head was ready, by route.",
            ["route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 30, 60, 120, 180, 300),
            registry=self._registry,
        )
        self._registry.register(_Fleet(worker_view, router))

    def init_app(self, app: Flask) -> None:
        app.before_request(_start_clock)
        app.after_request(self._count)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _count(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "(none)"
        self._requests.labels(route, response.status_code).inc()
        self._seconds.labels(route).observe(time.monotonic() - g.get("started", time.monotonic()))
        return response


def _start_clock() -> None:
    g.started = time.monotonic()


class _Fleet(Collector):
    """Gauges read at scrape time."""

    def __init__(self, worker_view: WorkerView, router: EventRouter) -> None:
        self._worker_view = worker_view
        self._router = router

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("workers", "Workers by model and state.", labels=["model", "state"])
        running = GaugeMetricFamily("requests_running", "Requests in workers' hands.", labels=["model"])
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
            "requests_open", "Requests this web process waits for.", value=len(self._router.inboxes())
        )
        yield GaugeMetricFamily(
            "redis_up", "Redis answered the last time.", value=float(self._worker_view.reachable)
        )
