"""What a worker does once a second, beside its requests: it renews its lease, cancels requests that nobody
waits for, follows an operator's drain, checks the engine, and measures throughput.
"""

import logging
from collections.abc import Callable

from redis.exceptions import RedisError

from workers.abandoned import AbandonedRequests
from workers.held_lease import HeldLease, WorkerReplaced
from workers.queue_watch import NotConsuming, QueueWatch
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

TICK_S = 1.0


class Heartbeat:
    """Works from before the model is loaded until the process ends, in the thread that calls `run`.

    `look_for_drain` is called in each tick, before the lease is renewed, `publish_metrics` after each
    renewal; both may raise redis.RedisError.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        lease: HeldLease,
        queue_watch: QueueWatch,
        abandoned: AbandonedRequests,
        *,
        look_for_drain: Callable[[], None],
        publish_metrics: Callable[[], None],
    ) -> None:
        self._watchdog = watchdog
        self._lease = lease
        self._queue_watch = queue_watch
        self._abandoned = abandoned
        self._look_for_drain = look_for_drain
        self._publish_metrics = publish_metrics
        self._stopping = False

    def run(self) -> None:
        """Tick until `stop`.

        Raises EngineHung, WorkerReplaced and NotConsuming: then the process must end.
        """
        while not self._stopping:
            self.tick()
            self._lease.changed.wait(TICK_S)

    def stop(self) -> None:
        """End `run` after the tick in progress; the lease is not renewed any more."""
        self._stopping = True
        self._lease.stop()

    def tick(self) -> None:
        """Check the engine, renew the lease when it is due, measure, and cancel what nobody waits for.

        Raises EngineHung, WorkerReplaced and NotConsuming.
        """
        self._watchdog.check()
        try:
            # first, so that no record of a worker under drain says that it is ready
            self._look_for_drain()
            if self._lease.renew_if_due():
                self._abandoned.cancel_for_lost_webs()
                self._publish_metrics()
            self._queue_watch.look()
            self._abandoned.cancel()
        except (WorkerReplaced, NotConsuming):
            raise
        except RedisError as error:
            self._abandoned.interrupt()
            self._queue_watch.interrupt()
            log.warning("the lease was not renewed: %s", error)
        except Exception:
            # without this thread the lease would expire, so it must go on
            self._abandoned.interrupt()
            log.exception("the heartbeat failed")
