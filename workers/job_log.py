"""The line that a worker logs of each job, when it has ended."""

import logging
import time

from logs import Entry
from protocol.events import (
    Delta,
    Event,
    Failed,
    Finished,
    ImageReady,
    Progress,
    Usage,
    has_tokens,
)
from protocol.jobs import EmbeddingJob, ImageJob, Job

log = logging.getLogger(__name__)

COMPLETED = "completed"
UNDELIVERED = "undelivered"
"""The outcome of a job whose events could not be written."""


class JobLog:
    """What the line of one job will tell, gathered from its events. It has nothing that a client has sent."""

    __slots__ = (
        "_began_at",
        "_finish_reasons",
        "_first_token_at",
        "_inputs",
        "_steps",
        "gpu_s",
        "height",
        "images",
        "model",
        "outcome",
        "queued_s",
        "request_id",
        "steps_done",
        "task",
        "traceparent",
        "usage",
        "wallet_sha256",
        "width",
    )

    def __init__(self, request_id: str, model: str, job: Job | None, queued_s: float | None) -> None:
        """`job`: None if it could not be read. `queued_s`: seconds from its admission to its claim."""
        self.request_id = request_id
        self.model = model
        self.task = None if job is None else _task(job)
        self.wallet_sha256 = job and job.wallet_sha256
        self.traceparent = None if job is None else job.traceparent
        self._inputs = len(job.inputs) if isinstance(job, EmbeddingJob) else None
        self.queued_s = queued_s
        self._began_at = time.monotonic()
        self._first_token_at: float | None = None
        self._finish_reasons: dict[int, str] = {}
        self.usage: Usage | None = None
        self._steps: int | None = None
        self.images = 0
        self.steps_done = 0
        """Denoising steps so far, over all images."""
        self.width: int | None = None
        self.height: int | None = None
        self.outcome = ""
        self.gpu_s: float | None = None
        """Its part of the worker's time (workers.gpu_time); None if the engine never had it."""

    @property
    def finish_reason(self) -> str | None:
        """Why the answer of a chat ended, that of the first choice which did; None for images and
        failures."""
        return next(iter(self._finish_reasons.values()), None)

    @property
    def finish_reasons(self) -> list[str]:
        """Why the choices of a chat ended, in the order in which they did."""
        return list(self._finish_reasons.values())

    @property
    def seconds(self) -> float:
        """Seconds since the claim."""
        return time.monotonic() - self._began_at

    @property
    def first_token_after_s(self) -> float | None:
        """Seconds from the claim to the first token of a chat."""
        return None if self._first_token_at is None else self._first_token_at - self._began_at

    def observe(self, event: Event) -> None:
        """Take an event that the engine has made. Of plain text only the first one is needed."""
        if self._first_token_at is None and has_tokens(event):
            self._first_token_at = time.monotonic()
        if isinstance(event, Delta):
            if event.finish_reason is not None:
                self._finish_reasons[event.index] = event.finish_reason
        elif isinstance(event, Finished):
            self.usage, self.outcome = event.usage, COMPLETED
        elif isinstance(event, Failed):
            self.outcome = event.code
        elif isinstance(event, Progress):
            self.steps_done, self._steps = event.step, event.total
        elif isinstance(event, ImageReady):
            self.images += 1
            self.width, self.height = event.width, event.height

    def write(self) -> None:
        """Write the line."""
        usage = self.usage
        entry = Entry(
            "job",
            request_id=self.request_id,
            model=self.model,
            task=self.task,
            outcome=self.outcome,
            finish_reason=",".join(dict.fromkeys(self._finish_reasons.values())) or None,
            prompt_tokens=usage and usage.prompt_tokens,
            cached_tokens=usage and usage.cached_tokens,
            completion_tokens=usage and usage.completion_tokens,
            inputs=self._inputs,
            images=self.images or None,
            steps=self._steps,
            width=self.width,
            height=self.height,
            queued_s=None if self.queued_s is None else round(self.queued_s, 3),
            first_token_s=self._since_admission(self._first_token_at),
            total_s=self._since_admission(time.monotonic()),
            gpu_s=None if self.gpu_s is None else round(self.gpu_s, 3),
        )
        log.info(entry)

    def _since_admission(self, at: float | None) -> float | None:
        return None if at is None else round(at - self._began_at + (self.queued_s or 0.0), 3)


def _task(job: Job) -> str:
    return job.task if isinstance(job, ImageJob) else str(job.__struct_config__.tag)
