"""A worker's heartbeat: renews its lease, cancels requests that nobody waits for, watches the engine."""

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from protocol.leases import REFRESH_S, Leases, Observation, WorkerRecord
from protocol.queue import JobQueue
from workers.engines.base import Engine
from workers.runner import Runner

log = logging.getLogger(__name__)

TICK_S = 1.0
STOP_S = 5.0
"""Above the time limit of a command to Redis."""


class Heartbeat(threading.Thread):
    """Runs from before the model is loaded until the process ends.

    `describe()` returns the current record. `on_expired()` is called when the lease had expired, so that this
    worker looked lost; `on_replaced()` when another incarnation holds the lease; `on_hung(reason)` when the
    engine's thread has died or the engine makes no progress.
    """

    def __init__(
        self,
        leases: Leases,
        queue: JobQueue,
        *,
        describe: Callable[[], WorkerRecord],
        on_expired: Callable[[], None],
        on_replaced: Callable[[], None],
        on_hung: Callable[[str], None],
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._leases = leases
        self._queue = queue
        self._describe = describe
        self._on_expired = on_expired
        self._on_replaced = on_replaced
        self._on_hung = on_hung
        self._hang_s = hang_s
        self._clock = clock
        self._observation = Observation(clock)
        self._wake = threading.Event()
        self._stopping = False
        self._renewing = threading.Lock()
        self._watched: tuple[Engine, Runner] | None = None
        self._judging = True
        self._renew_at = 0.0
        self._renewed_once = False
        self._progress = (0, clock())

    def watch(self, engine: Engine, runner: Runner) -> None:
        """Begin to watch the engine. Called after it has loaded and passed its canary."""
        self._progress = (engine.status().steps, self._clock())
        self._watched = (engine, runner)

    def spare_engine(self) -> None:
        """Stop watching the engine, because it is being closed."""
        self._judging = False

    def beat_now(self) -> None:
        """Renew the lease at once, because the record has changed."""
        self._renew_at = 0.0
        self._wake.set()

    def stop(self) -> None:
        """End the thread. Waits, for at most STOP_S, for a renewal under way: it would undo a release."""
        self._stopping = True
        self._wake.set()
        if self._renewing.acquire(timeout=STOP_S):
            self._renewing.release()

    def run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            self.tick()
            self._wake.wait(TICK_S)

    def tick(self) -> None:
        """Check the engine, renew the lease when it is due, cancel what nobody waits for. Never raises."""
        self._judge_engine()
        try:
            self._beat()
        except RedisError as error:
            self._observation.interrupt()
            log.warning("lease not renewed, Redis can't be reached: %s", error)
        except Exception:
            # without this thread the worker would be taken for dead
            self._observation.interrupt()
            log.exception("a beat failed")

    def _beat(self) -> None:
        now = self._clock()
        if now >= self._renew_at:
            record = self._describe()
            with self._renewing:
                if self._stopping:
                    return
                before = self._leases.renew_worker(record)
            self._renew_at = now + REFRESH_S
            if before and before != record.incarnation_id and self._renewed_once:
                self._on_replaced()
            elif not before and self._renewed_once:
                log.warning("the lease had expired")
                self._on_expired()
            self._renewed_once = True
            self._cancel_for_lost_webs()
        if self._watched is not None:
            runner = self._watched[1]
            for request_id in self._queue.cancelled(runner.running()):
                runner.cancel(request_id)

    def _cancel_for_lost_webs(self) -> None:
        """Cancel the requests of web processes whose lease has expired: nobody reads their events any more.

        A missing lease counts only after leases have been watched for long enough (`Observation`). While the
        model loads there are no requests, and the renewal itself is the look.
        """
        if self._watched is None:
            self._observation.seen()
            return
        runner = self._watched[1]
        web_ids = runner.web_ids()
        living = self._leases.living_webs(sorted(web_ids))
        self._observation.seen()
        if self._observation.absence_counts():
            runner.set_lost_webs(web_ids - living)

    def _judge_engine(self) -> None:
        if self._watched is None or not self._judging:
            return
        status = self._watched[0].status()
        now = self._clock()
        steps, since = self._progress
        if status.steps != steps or status.running + status.waiting == 0:
            self._progress = (status.steps, now)
        elif now - since > self._hang_s:
            self._on_hung(f"the engine made no progress for {self._hang_s:g} s with requests running")
        if not status.alive:
            self._on_hung("the engine's thread has died")
