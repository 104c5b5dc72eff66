"""Looks at the queue of this worker's model: how many requests wait, and whether Celery takes any."""

from collections.abc import Callable

from protocol.queue import JobQueue
from workers.runner import Runner
from workers.throughput import Throughput

DEAF_LOOKS = 10
"""Celery takes a message within a second; after a lost connection it needs a few."""


class NotConsuming(Exception):
    """Raised when messages wait though this worker has free slots: Celery does not consume its queue.

    A remote command, or a connection that Celery lost unnoticed, can be the reason.
    """


class QueueWatch:
    """`is_ready`: whether this worker takes requests."""

    def __init__(
        self,
        queue: JobQueue,
        runner: Runner,
        throughput: Throughput,
        *,
        model: str,
        is_ready: Callable[[], bool],
    ) -> None:
        self._queue = queue
        self._runner = runner
        self._throughput = throughput
        self._model = model
        self._is_ready = is_ready
        self._received = 0
        self._deaf_looks = 0

    def look(self) -> None:
        """Look once; called every second. Raises NotConsuming after DEAF_LOOKS in a row at which messages
        waited, a slot was free and none was received, and redis.RedisError.

        Looks are counted, not seconds: while Redis stalls nobody can receive anything.
        """
        self._throughput.look(self._queue.waiting(self._model))
        received = self._runner.received
        has_room = len(self._runner.running()) < self._throughput.slots
        is_deaf = self._is_ready() and has_room and self._queue.queued(self._model) > 0
        if not is_deaf or received != self._received:
            self._received, self._deaf_looks = received, 0
            return
        self._deaf_looks += 1
        if self._deaf_looks > DEAF_LOOKS:
            raise NotConsuming(
                "requests waited while this worker was free: Celery does not consume its queue"
            )

    def interrupt(self) -> None:
        """Count from the beginning: Redis did not answer."""
        self._deaf_looks = 0
