"""The worker's pulse: keeps the lease, learns of cancelled requests, and ends a process whose engine is dead or stuck."""

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
STOP_S = 5.0  # above the time limit of a command to Redis


class Heartbeat(threading.Thread):
    """Runs from before the model is loaded until the process ends.

    `describe()` gives the record as it is now. `on_lapsed()`: the lease had lapsed, others took this worker for lost.
    `on_replaced()`: another incarnation of this cid lives. `on_hung(reason)`: the engine is dead or stuck.
    """

    def __init__(
        self,
        leases: Leases,
        queue: JobQueue,
        *,
        describe: Callable[[], WorkerRecord],
        on_lapsed: Callable[[], None],
        on_replaced: Callable[[], None],
        on_hung: Callable[[str], None],
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._leases = leases
        self._queue = queue
        self._describe = describe
        self._on_lapsed = on_lapsed
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
        """Begin to judge the engine: it has loaded and passed its canary."""
        self._progress = (engine.status().steps, self._clock())
        self._watched = (engine, runner)

    def spare_engine(self) -> None:
        """Judge the engine no more: it is being closed."""
        self._judging = False

    def beat_now(self) -> None:
        """Renew the lease at once: what the record says has changed."""
        self._renew_at = 0.0
        self._wake.set()

    def stop(self) -> None:
        """Renew no more. Returns once no renewal is under way, which would undo a release; after STOP_S at most."""
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
        """Check the engine, renew the lease when it is due, and cancel what nobody waits for. Never raises."""
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
                log.warning("the lease had lapsed")
                self._on_lapsed()
            self._renewed_once = True
            self._cancel_for_lost_webs()
        if self._watched is not None:
            runner = self._watched[1]
            for request_id in self._queue.cancelled(runner.running()):
                runner.cancel(request_id)

    def _cancel_for_lost_webs(self) -> None:
        """Cancel the requests of web processes whose lease has expired: nobody reads their events any more.

        A missing lease counts only after leases have been watched for long enough (`Observation`). While the model
        loads there is no request yet; the renewal itself is the look.
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
            self._on_hung(f"the engine made no progress for {self._hang_s:g} s with work in hand")
        if not status.alive:
            self._on_hung("the engine's thread has died")
