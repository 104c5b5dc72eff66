"""What gunicorn starts and stops in a web process."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from app.dispatch.heartbeat import WebHeartbeat
from app.dispatch.worker_view import WorkerView
from app.http.request_trace import RequestTraces
from node.reconciler import Reconciler
from protocol.event_router import EventRouter

log = logging.getLogger(__name__)

START_S = 5.0
"""How long a start waits for Redis."""


class WebProcess:
    """The threads of a web process (greenlets under gunicorn), and whether it is connected or stopping.

    `warnings`: those of the settings, which a start logs and a command doesn't.
    """

    def __init__(
        self,
        *,
        router: EventRouter,
        worker_view: WorkerView,
        heartbeat: WebHeartbeat,
        reconciler: Reconciler | None,
        traces: RequestTraces,
        warnings: Sequence[str] = (),
    ) -> None:
        self._router = router
        self._worker_view = worker_view
        self._heartbeat = heartbeat
        self._reconciler = reconciler
        self._traces = traces
        self._warnings = warnings
        self._gunicorn_worker: Any = None
        self._stopping_since: float | None = None

    def start(self, gunicorn_worker: Any = None) -> None:
        """Start the threads. Call this after the fork, because threads do not survive one.

        Returns when requests can be dispatched, or after `START_S` without Redis. gunicorn then accepts
        connections, and a process that can't serve them yet would get as many as one that can.
        """
        self._gunicorn_worker = gunicorn_worker
        for warning in self._warnings:
            log.warning("%s", warning)
        self._traces.start()
        self._router.start()
        self._heartbeat.start()
        if self._reconciler is not None:
            self._reconciler.start()
        give_up_at = time.monotonic() + START_S
        while not self.connected() and time.monotonic() < give_up_at:
            time.sleep(0.02)

    def stop(self) -> None:
        """End the threads; the heartbeat then releases the lease of this process."""
        if self._reconciler is not None:
            self._reconciler.stop()
        self._heartbeat.stop()
        self._router.stop()
        self._traces.stop()

    def connected(self) -> bool:
        """Whether Redis reads and writes and events are received, so that requests can be dispatched."""
        return self.redis_state() == "ok"

    def redis_state(self) -> str:
        """Return "ok", "unreachable", or "refuses writes: " and the reason."""
        if not self._worker_view.reachable:
            return "unreachable"
        if self._heartbeat.refusal:
            return f"refuses writes: {self._heartbeat.refusal}"
        return "ok" if self._router.subscribed.is_set() else "unreachable"

    def draining_for_s(self) -> float:
        """Return the seconds since gunicorn told this process to stop was first seen; 0 before that.

        gunicorn sets `alive` of its worker object to False at SIGTERM.
        """
        if self._gunicorn_worker is None or self._gunicorn_worker.alive:
            return 0.0
        now = time.monotonic()
        if self._stopping_since is None:
            self._stopping_since = now
        return max(now - self._stopping_since, 0.001)
