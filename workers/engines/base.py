"""The interface of an engine. It knows neither Celery nor Redis nor HTTP, so a test or a REPL can run one."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from protocol.events import Event
from protocol.jobs import Job
from workers.engines.token_gaps import TokenGaps

Emit = Callable[[Sequence[tuple[str, Event]]], None]
"""Takes the events of one step as (request id, event) and returns at once. May be called from any thread."""

CancelReason = Literal["cancelled", "deadline"]


class EngineCounts(NamedTuple):
    """What a chat engine has counted since its start, in tokens but for `preemptions`.

    `prompt_tokens` has those of the prefix cache too. `prefix_queries`: prompt tokens that were looked up
    there.
    """

    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    token_gaps: TokenGaps


class EngineStatus(NamedTuple):
    """The state of an engine for watchdog and worker record. `steps` grows with any kind of progress.

    `max_model_len`: limit of prompt and answer together, or of an input, in tokens; 0 before the load, and
    for image models. `kv_cache_usage`: the part of the KV cache that running sequences hold, 0 to 1; None
    without a cache. `takes_images`: whether messages of a chat may have images.
    """

    alive: bool
    running: int
    waiting: int
    steps: int
    max_model_len: int = 0
    kv_cache_usage: float | None = None
    counts: EngineCounts | None = None
    takes_images: bool = False


class EngineLoadError(Exception):
    """The model can't be served until a person changes something: wrong weights, an unsupported architecture.

    The message is one line for the operator.
    """


class TemporaryLoadError(EngineLoadError):
    """The load failed for a reason that may pass by itself: a disk or a hub that is away, a GPU that others
    fill.

    A later attempt may succeed.
    """


class Engine(Protocol):
    """A loaded model that works on several jobs at once, in its own threads."""

    def load(self, emit: Emit) -> None:
        """Load the weights, warm up and start.

        Raises EngineLoadError, for what may pass its TemporaryLoadError.
        """

    def submit(self, job: Job) -> None:
        """Take a job and return at once. Its events go to `emit`; exactly one Finished or Failed is the last.

        A job that can't be served does not raise: its Failed event is made from a class of protocol.errors.
        """

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """Stop a job within two steps. May be called from any thread; unknown ids are ignored.

        "cancelled" fails the job with Cancelled. "deadline" finishes a chat that has a token, with
        finish_reason "length", and fails any other job with DeadlineExceeded.
        """

    def status(self) -> EngineStatus:
        """Return a snapshot. Never blocks, not even while the device hangs."""

    def close(self) -> None:
        """Stop the threads and free the device. Open jobs fail with ShuttingDown."""
