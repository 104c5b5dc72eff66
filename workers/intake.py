"""Whether Celery takes messages from the queue of the worker's model."""

from typing import Any

from celery import Celery


class Intake:
    """Opens and closes the queue for this process; it is open at the start.

    `open` and `close` may be called from any thread and as often as one likes: Celery's loop carries them
    out. A message that Redis has handed over meanwhile goes back into the queue, where another worker finds
    it.
    """

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._queue: str = celery.conf.task_default_queue
        self._consumer: Any = None

    def connect(self, consumer: Any, *, closed: bool) -> None:
        """Remember Celery's consumer, and close before it asks for messages.

        Called by its thread at `worker_ready`.
        """
        self._consumer = consumer
        if closed:
            self._close()

    def open(self) -> None:
        """Take messages."""
        if self._consumer is not None and not self._selected:
            self._consumer.call_soon(self._open)

    def close(self) -> None:
        """Take no more messages."""
        if self._consumer is not None and self._selected:
            self._consumer.call_soon(self._close)

    @property
    def closed(self) -> bool:
        """Whether no message can arrive any more."""
        if self._consumer is None:
            return True
        # kombu asks Redis for a message and waits for the answer for a second, closed or not
        channel = getattr(self._consumer.task_consumer, "channel", None)
        return not self._selected and not getattr(channel, "_in_poll", None)

    @property
    def _selected(self) -> bool:
        """Whether Celery consumes the queue, or will when it has connected again."""
        return self._queue in self._celery.amqp.queues.consume_from

    def _open(self) -> None:
        if not self._selected:
            queues = self._celery.amqp.queues
            queues.select_add(queues[self._queue])
            if self._consumer.task_consumer is not None:
                self._consumer.add_task_queue(self._queue)

    def _close(self) -> None:
        if self._selected:
            self._celery.amqp.queues.deselect([self._queue])
            if self._consumer.task_consumer is not None:
                self._consumer.cancel_task_queue(self._queue)
