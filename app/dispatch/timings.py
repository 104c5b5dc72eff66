"""The times of a request until its claim, its first token and its end, and what its events tell of its
outcome."""

import time
from collections.abc import Callable, Sequence

from app.dispatch.request_metrics import ModelTimes
from protocol.events import Event, Finished, ImageReady, Started, Usage, has_tokens

Clock = Callable[[], float]


class Timings:
    """The times of one request, from when it was validated. Each is None until it is known.

    `metrics`: the histograms of its model, which get each time when it is known.
    """

    __slots__ = (
        "_began_at",
        "_clock",
        "_first_token_at",
        "_metrics",
        "_started_at",
        "images",
        "incarnation_id",
        "usage",
    )

    def __init__(self, metrics: ModelTimes | None = None, clock: Clock = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began_at = clock()
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self.incarnation_id: str | None = None
        """Of the worker that has claimed it."""
        self.usage: Usage | None = None
        """Its tokens, once it is finished."""
        self.images = 0
        """How many of its images are ready."""

    @classmethod
    def resumed(
        cls,
        elapsed_s: float,
        queued_s: float | None,
        first_token_s: float | None,
        clock: Clock = time.monotonic,
    ) -> "Timings":
        """Make those of a request that another connection has begun, `elapsed_s` ago.

        They are in no metric.
        """
        timings = cls(clock=clock)
        timings._began_at -= elapsed_s
        timings._started_at = None if queued_s is None else timings._began_at + queued_s
        timings._first_token_at = None if first_token_s is None else timings._began_at + first_token_s
        return timings

    def note(self, batch: Sequence[Event]) -> None:
        """Look at events that have just arrived."""
        if batch and isinstance(batch[-1], Finished) and batch[-1].usage is not None:
            # a completion has a job for each prompt
            self.usage = batch[-1].usage.plus(self.usage)
        if self._first_token_at is not None:
            return
        for event in batch:
            if isinstance(event, Started):
                self._started_at = self._clock()
                self.incarnation_id = event.incarnation_id
                if self._metrics is not None:
                    self._metrics.queue.observe(self._started_at - self._began_at)
            elif isinstance(event, ImageReady):
                self.images += 1
            elif has_tokens(event):
                self._first_token_at = now = self._clock()
                if self._metrics is not None:
                    self._metrics.first_token.observe(now - self._began_at)
                    self._metrics.prefill.observe(now - (self._started_at or self._began_at))
                return

    def end(self, *, finished: bool) -> None:
        """Note the end of the request; `finished`: with a complete answer. May be called more than once."""
        metrics, self._metrics = self._metrics, None
        if metrics is None or not finished:
            return
        now = self._clock()
        metrics.request.observe(now - self._began_at)
        if self._first_token_at is not None:
            metrics.decode.observe(now - self._first_token_at)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request was validated."""
        return self._clock() - self._began_at

    @property
    def queued_s(self) -> float | None:
        """Seconds until a worker had claimed the request."""
        return self._since_begin(self._started_at)

    @property
    def first_token_s(self) -> float | None:
        """Seconds until the first token of a chat."""
        return self._since_begin(self._first_token_at)

    def milliseconds(self) -> dict[str, int]:
        """Return what is known of queued_ms, first_token_ms and total_ms, which ends now. For clients."""
        times = {
            "queued_ms": self.queued_s,
            "first_token_ms": self.first_token_s,
            "total_ms": self._since_begin(self._clock()),
        }
        return {name: round(seconds * 1000) for name, seconds in times.items() if seconds is not None}

    def _since_begin(self, at: float | None) -> float | None:
        return None if at is None else round(at - self._began_at, 3)
