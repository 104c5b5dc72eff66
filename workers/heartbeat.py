"""What a worker does once a second, beside its requests: it renews its lease, cancels requests that nobody waits
for, follows an operator's drain, checks the engine, and measures throughput.
"""

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from protocol.leases import REFRESH_S, Leases, Observation, WorkerRecord
from protocol.queue import JobQueue
from workers.runner import Runner
from workers.stream_readers import StreamReaders
from workers.throughput import Throughput
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

TICK_S = 1.0
STOP_S = 5.0
"""Above the time limit of a command to Redis."""
DEAF_LOOKS = 10
"""Celery takes a message within a second; after a lost connection it needs a few."""


class WorkerReplaced(Exception):
    """Raised by the heartbeat when another worker holds the lease of this one's cid. It started later, as each takes
    the lease at its start.
    """


class NotConsuming(Exception):
    """Raised by the heartbeat when messages wait though this worker has free slots: Celery does not consume its queue.

    A remote command, or a connection that Celery lost unnoticed, can be the reason.
    """


class Heartbeat:
    """Works from before the model is loaded until the process ends, in the thread that calls `run`.

    `get_record` returns the record to write. `renew_now` is set by others when that record has changed.
    `on_expired` is called when the lease had expired, after which others may have taken this worker for
    lost. `look_for_drain` is called in each tick, before the lease is renewed, `publish_metrics` after each
    renewal; both may raise redis.RedisError.
    """

    def __init__(
        self,
        leases: Leases,
        queue: JobQueue,
        runner: Runner,
        readers: StreamReaders,
        watchdog: Watchdog,
        throughput: Throughput,
        *,
        model: str,
        get_record: Callable[[], WorkerRecord],
        renew_now: threading.Event,
        on_expired: Callable[[], None],
        look_for_drain: Callable[[], None],
        publish_metrics: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._queue = queue
        self._runner = runner
        self._readers = readers
        self._watchdog = watchdog
        self._throughput = throughput
        self._model = model
        self._get_record = get_record
        self._renew_now = renew_now
        self._on_expired = on_expired
        self._look_for_drain = look_for_drain
        self._publish_metrics = publish_metrics
        self._clock = clock
        self._observation = Observation(clock)
        self._stopping = False
        self._renewing = threading.Lock()
        self._renew_at = 0.0
        self._renewed_once = False
        self._received = 0
        self._deaf_looks = 0

    def run(self) -> None:
        """Tick until `stop`. Raises EngineHung and WorkerReplaced: then the process must end."""
        while not self._stopping:
            self.tick()
            self._renew_now.wait(TICK_S)

    def stop(self) -> None:
        """Renew no more. Waits up to STOP_S for a renewal in progress, which would undo a release."""
        self._stopping = True
        self._renew_now.set()
        if self._renewing.acquire(timeout=STOP_S):
            self._renewing.release()

    def tick(self) -> None:
        """Check the engine, renew the lease when it is due, measure, and cancel what nobody waits for.

        Raises EngineHung and WorkerReplaced.
        """
        self._watchdog.check()
        try:
            # first, so that no record of a worker under drain says that it is ready
            self._look_for_drain()
            if self._renew_now.is_set():
                self._renew_now.clear()
                self._renew_at = 0.0
            if self._clock() >= self._renew_at:
                self._renew()
            self._throughput.look(self._queue.waiting(self._model))
            self._check_consuming()
            self._readers.follow()
            for request_id in self._queue.cancelled(self._runner.running()):
                self._runner.cancel(request_id)
        except (WorkerReplaced, NotConsuming):
            raise
        except RedisError as error:
            self._observation.interrupt()
            self._deaf_looks = 0
            log.warning("the lease was not renewed: %s", error)
        except Exception:
            # without this thread the lease would expire, so it must go on
            self._observation.interrupt()
            log.exception("the heartbeat failed")

    def _renew(self) -> None:
        record, now = self._get_record(), self._clock()
        with self._renewing:
            if self._stopping:
                return
            hold = self._leases.renew_worker if self._renewed_once else self._leases.seize_worker
            before = hold(record)
        self._renew_at = now + REFRESH_S
        if self._renewed_once and not before:
            log.warning("the lease had expired")
            self._on_expired()
        elif self._renewed_once and before != record.incarnation_id:
            raise WorkerReplaced
        self._renewed_once = True
        self._cancel_for_lost_webs()
        self._publish_metrics()

    def _check_consuming(self) -> None:
        """Raise NotConsuming after DEAF_LOOKS in a row at which messages waited, a slot was free and none was received.

        Looks are counted, not seconds: while Redis stalls nobody can receive anything.
        """
        received = self._runner.received
        has_room = len(self._runner.running()) < self._throughput.slots
        is_deaf = self._get_record().state == "ready" and has_room and self._queue.queued(self._model) > 0
        if not is_deaf or received != self._received:
            self._received, self._deaf_looks = received, 0
            return
        self._deaf_looks += 1
        if self._deaf_looks > DEAF_LOOKS:
            raise NotConsuming(
                "requests waited while this worker was free: Celery does not consume its queue"
            )

    def _cancel_for_lost_webs(self) -> None:
        """Cancel the requests of web processes whose lease has expired: nobody reads their events any more.

        A missing lease counts only after leases have been watched for long enough (`Observation`).
        """
        web_ids = self._runner.web_ids()
        living = self._leases.living_webs(sorted(web_ids))
        self._observation.seen()
        if self._observation.absence_counts():
            lost = web_ids - living
            self._readers.leave_lost(lost)
            self._runner.set_lost_webs(lost)
