"""What this web process counts of its responses, and how all its metrics get to the other processes."""

import time

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.http.access_log import current_access
from protocol.event_router import EventRouter
from protocol.metrics import MetricStore, Snapshot, families_of

OPEN = "requests_open"


class ProcessMetrics:
    """Counts the responses of this process, and publishes all that is in `registry`."""

    def __init__(
        self, registry: CollectorRegistry, router: EventRouter, store: MetricStore, *, web_id: str
    ) -> None:
        self._registry = registry
        self._store = store
        self._web_id = web_id
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

    def init_app(self, app: Flask) -> None:
        """Count the responses of `app`. Call this first, to count those of other hooks too."""
        app.after_request(self._count)

    def publish(self) -> None:
        """Write this process's metrics for the others. Raises redis.RedisError."""
        labels = {"web": self._web_id}
        self._store.write(
            self._web_id, Snapshot(labels=labels, families=families_of(self._registry), web_id=self._web_id)
        )

    def _count(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "(none)"
        self._requests.labels(route, response.status_code).inc()
        self._seconds.labels(route).observe(time.monotonic() - current_access().began_at)
        return response
