"""What a web process does once a second, beside its requests.

It renews its lease, with which its metrics are written, looks at the leases of the workers, deletes what
ended requests have left in Redis, writes what the process did, and has the requests checked for which no
events arrive.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from redis.exceptions import RedisError

from app.dispatch.activity import Activity
from app.dispatch.monitor import RequestMonitor
from app.dispatch.worker_view import WorkerView
from protocol.leases import REFRESH_S, Leases
from protocol.queue import JobQueue

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


class WebHeartbeat(threading.Thread):
    """One thread in each web process (a greenlet under gunicorn)."""

    def __init__(
        self,
        web_id: str,
        leases: Leases,
        worker_view: WorkerView,
        queue: JobQueue,
        activity: Activity,
        monitor: RequestMonitor,
        *,
        gap_seen: threading.Event,
        publish_metrics: Callable[[], None],
    ) -> None:
        """`gap_seen`: that of the event router. `publish_metrics` is called with each renewal of the lease,
        and may raise redis.RedisError."""
        super().__init__(name="heartbeat", daemon=True)
        self._web_id = web_id
        self._leases = leases
        self._worker_view = worker_view
        self._queue = queue
        self._activity = activity
        self._monitor = monitor
        self._gap_seen = gap_seen
        self._publish_metrics = publish_metrics
        self._renew_at = 0.0
        self._refusal = ""
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the thread after the tick that is running. Does not wait for it."""
        self._stopping.set()
        self._gap_seen.set()

    def run(self) -> None:
        """Tick until `stop` is called, then release the lease of this process. Gaps are filled in between."""
        tick_at = 0.0
        while not self._stopping.is_set():
            due = time.monotonic() >= tick_at
            try:
                if due:
                    self.tick()
                else:
                    self._monitor.fill_gaps()
            except RedisError as error:
                log.warning("Redis can't be reached: %s", error)
            except Exception:
                # without this thread, a request whose worker died would wait until its deadline
                log.exception("the heartbeat failed; it continues")
            if due:
                tick_at = time.monotonic() + INTERVAL_S
            self._gap_seen.wait(max(0.0, tick_at - time.monotonic()))
            self._gap_seen.clear()
        try:
            self._activity.write()
            self._publish_metrics()
            self._leases.release_web(self._web_id)
        except RedisError:
            log.info("Redis can't be reached: the lease of this process was not released and will expire")

    @property
    def refusal(self) -> str:
        """Why Redis refused the last write, "" if it took it.

        One that is full or a replica answers reads all the same.
        """
        return self._refusal

    def tick(self) -> None:
        """Renew the lease when it is due, look at the workers, delete, write, check.

        Raises redis.RedisError.
        """
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew(now)
        self._worker_view.refresh()
        self._queue.sweep()
        # _renew tells of a Redis that refuses writes; requests are checked all the same
        with suppress(RedisError):
            self._activity.write()
        self._monitor.check()

    def _renew(self, now: float) -> None:
        """Renew the lease of this process.

        A Redis that refuses it must not keep requests from being checked.
        """
        try:
            self._leases.renew_web(self._web_id)
        except RedisError as error:
            if not self._refusal:
                log.warning("Redis refuses to write: %s", error)
            self._refusal = str(error) or type(error).__name__
        else:
            self._refusal = ""
            self._renew_at = now + REFRESH_S
            self._publish_metrics()
