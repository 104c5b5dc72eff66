"""What every engine is. An engine knows neither Celery nor Redis nor HTTP: it can be run from a test or a REPL."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from protocol.events import Event
from protocol.jobs import Job

Emit = Callable[[Sequence[tuple[str, Event]]], None]
"""Takes what requests gained in one step, as (request id, event), and returns at once. May be called from any thread."""

CancelReason = Literal["cancelled", "deadline"]


class EngineStatus(NamedTuple):
    """What the watchdog and the lease want to know. `steps` grows with every piece of progress, whatever its size."""

    alive: bool
    running: int
    waiting: int
    steps: int


class EngineLoadError(Exception):
    """The model can't be served: wrong weights, an architecture we refuse, too little memory. One line, for the operator."""


class Engine(Protocol):
    """A loaded model that works on several jobs at once, in threads of its own."""

    def load(self, emit: Emit) -> None:
        """Load the weights, warm up and start. Raises EngineLoadError."""

    def submit(self, job: Job) -> None:
        """Take a job and return at once. Its events reach `emit`, ended by exactly one Finished or Failed, always.

        Never raises for what the job asks: that is a Failed event made from a class of protocol.errors.
        """

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """Stop a job within two steps, from any thread; unknown ids are ignored.

        "cancelled" fails it with Cancelled. "deadline" ends a chat that has a token properly, with finish_reason
        "length", and fails anything else with DeadlineExceeded.
        """

    def status(self) -> EngineStatus:
        """A snapshot that never blocks, also while the device hangs."""

    def close(self) -> None:
        """Stop the threads and free the device. What still runs fails with ShuttingDown."""
