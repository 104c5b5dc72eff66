"""The image engine. One thread runs pipelines, call after call; another decodes sources and encodes results.

A job is prepared, waits, and is generated in one or more calls, together with compatible requests. It stays
in `_open` until its terminal event; the thread that removes it sends that event, so there is exactly one.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from catalogue import ImageModelEntry
from protocol.errors import Cancelled, DeadlineExceeded, EngineError, ShuttingDown
from protocol.events import Event, Failed, Finished, ImagePreview, ImageReady, Progress
from protocol.jobs import ImageJob, Job
from workers.engines.base import CancelReason, Emit, EngineStatus
from workers.engines.failures import failure_of, free_memory
from workers.engines.images.batches import BatchItem, BatchQueue
from workers.engines.images.loader import Pipelines, load_pipelines
from workers.engines.images.pixels import encode_jpeg, encode_png, paste_back
from workers.engines.images.previews import Previews
from workers.engines.images.request import prepare, warm_up_requests
from workers.engines.load_errors import load_error

_GATHER_S = 0.01
"""How long a call that is not full waits for more requests. It delays a request that comes alone."""

_SHUTTING_DOWN = Failed.of(ShuttingDown())
_CANCELLED: dict[CancelReason, Failed] = {
    "cancelled": Failed.of(Cancelled()),
    "deadline": Failed.of(DeadlineExceeded()),
}

log = logging.getLogger(__name__)


class _BatchAbandoned(Exception):
    """Raised inside a pipeline call to stop it, because all its requests have ended."""


class ImageEngine:
    """Generates and edits images with one model. Implements workers.engines.base.Engine."""

    def __init__(self, entry: ImageModelEntry) -> None:
        self._entry = entry
        self._pipelines: Pipelines | None = None
        self._emit: Emit = lambda events: None
        self._lock = threading.RLock()
        """Also held while emitting, so that no event follows a terminal one."""
        self._work = threading.Condition(self._lock)
        self._open: dict[str, ImageJob] = {}
        """Jobs whose terminal event has not been sent, by id."""
        self._running: set[str] = set()
        """Ids of open jobs that are or were part of a call."""
        self._queue = BatchQueue(entry.engine.max_batch_size)
        self._closed = False
        self._steps = 0
        """Denoising steps, prepared jobs and delivered images."""
        self._operations = 0
        """Operations of pipeline calls, so that a long step is no hang."""
        self._pixels = ThreadPoolExecutor(1, thread_name_prefix="image-pixels")
        self._thread = threading.Thread(target=self._run, name="image-engine", daemon=True)

    def load(self, emit: Emit) -> None:
        """Load the weights, run one step with each pipeline, and start. Raises EngineLoadError."""
        self._emit = emit
        self._pipelines = load_pipelines(self._entry)
        try:
            for request in warm_up_requests(self._entry.name, self._pipelines):
                request.pipeline.warm_up(
                    request.shared, request.image_params(0), self._count_step, self._count_operation
                )
        except Exception as error:
            raise load_error(
                self._entry, error, f"warm-up failed: {type(error).__name__}: {error}"
            ) from error
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job and return at once. A second job with the id of an open one is ignored."""
        assert isinstance(job, ImageJob)
        with self._lock:
            if job.id in self._open:
                log.warning("request %s was submitted twice", job.id)
                return
            self._open[job.id] = job
            if self._closed:
                self._end(job, _SHUTTING_DOWN)
                return
            if job.task == "edit":
                self._pixels.submit(self._prepare, job)
                return
        # There is nothing to decode, so the job need not queue behind the pixels of others. The lock is not
        # held: counting the tokens of a long prompt would delay the steps of the others.
        self._prepare(job)

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """End a job now. A running call drops its images; it stops when no request is left."""
        with self._lock:
            if job := self._open.get(request_id):
                self._end(job, _CANCELLED[reason])

    def status(self) -> EngineStatus:
        """Return a snapshot without locking. A job counts as running from its first call to its end."""
        running = [request_id in self._running for request_id in list(self._open)]
        steps = self._steps + self._operations
        return EngineStatus(self._thread.is_alive(), sum(running), len(running) - sum(running), steps)

    def close(self) -> None:
        """End all jobs with "shutting_down", stop both threads and free the device."""
        with self._work:
            self._closed = True
            for job in list(self._open.values()):
                self._end(job, _SHUTTING_DOWN)
            self._work.notify_all()
        if self._thread.is_alive():
            # With a limit: a device that hangs must not keep the process from ending.
            self._thread.join(timeout=10)
        self._pixels.shutdown(wait=False, cancel_futures=True)
        self._pipelines = None
        free_memory()

    # The engine thread

    def _run(self) -> None:
        while batch := self._next_batch():
            self._generate(batch)

    def _next_batch(self) -> list[BatchItem]:
        """Wait until a batch is full or has gathered for long enough. Returns an empty list when closed."""
        with self._work:
            deadline: float | None = None
            while not self._closed:
                batch = self._queue.next_batch()
                if not batch:
                    deadline = None
                    self._work.wait()
                    continue
                deadline = deadline or time.monotonic() + _GATHER_S
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._queue.is_full(batch):
                    self._queue.start(batch)
                    self._running.update(item.request.job.id for item in batch)
                    return batch
                self._work.wait(remaining)
            return []

    def _generate(self, batch: list[BatchItem]) -> None:
        """Run one call and pass its images on. After a failure, generate each image in a call of its own.

        A call fails when the batch needs too much memory, or when one request makes it fail for the others.
        """
        try:
            images = self._call(batch)
        except _BatchAbandoned:
            return
        except Exception as error:
            # No reference to `error` may outlive this block: its frames hold the tensors of the call.
            failure = failure_of(error)
        else:
            for item, image in zip(batch, images, strict=True):
                item.request.generated += 1
                self._deliver_later(item, image)
            return
        free_memory()
        if len(batch) == 1:
            self._end(batch[0].request.job, failure)
            return
        for item in batch:
            if self._is_open(item.request.job):
                self._generate([item])

    def _call(self, batch: Sequence[BatchItem]) -> list[Image.Image]:
        first = batch[0].request
        previews = Previews(
            batch,
            is_wanted=lambda item: self._is_open(item.request.job),
            deliver=self._deliver_preview_later,
            passes_on=_BatchAbandoned,
        )

        def stop_if_abandoned() -> None:
            if not any(self._is_open(request.job) for request, _ in batch):
                raise _BatchAbandoned

        def on_step(step: int, total: int) -> None:
            self._count_step()
            stop_if_abandoned()
            self._report(batch, step, total)
            previews.make_due(step, total)

        def on_operation() -> None:
            self._count_operation()
            stop_if_abandoned()

        images = [request.image_params(index) for request, index in batch]
        return first.pipeline(first.shared, images, on_step, on_operation, previews.unfinished)

    def _report(self, batch: Sequence[BatchItem], step: int, total: int) -> None:
        """Emit progress. It counts the steps of all images of a request: n images of 20 steps make 20 n."""
        with self._lock:
            events: list[tuple[str, Event]] = []
            for request in dict.fromkeys(item.request for item in batch):
                images_in_call = sum(item.request is request for item in batch)
                steps = request.generated * total + images_in_call * step
                # After a failed call its images start again: progress must not go backwards.
                if self._is_open(request.job) and steps > request.steps_reported:
                    request.steps_reported = steps
                    events.append((request.job.id, Progress(steps, total * request.job.n)))
            if events:
                self._emit(events)

    # The pixels thread

    def _prepare(self, job: ImageJob) -> None:
        try:
            if (pipelines := self._pipelines) is None or not self._is_open(job):
                return  # it has ended while it waited for this thread, or with the engine
            request = prepare(job, pipelines)
        except Exception as error:
            self._end(job, failure_of(error))
        else:
            with self._work:
                self._steps += 1
                if self._is_open(job):
                    self._queue.add(request)
                    self._work.notify_all()

    def _deliver_later(self, item: BatchItem, image: Image.Image) -> None:
        with self._lock:
            if not self._closed:
                self._pixels.submit(self._deliver, item, image)

    def _deliver_preview_later(self, item: BatchItem, number: int, image: Image.Image) -> None:
        with self._lock:
            if not self._closed:
                self._pixels.submit(self._deliver_preview, item, number, image)

    def _deliver_preview(self, item: BatchItem, number: int, image: Image.Image) -> None:
        request, index = item
        if not self._is_open(request.job):
            return
        try:
            if request.source:
                image = paste_back(image, request.source)
            preview = ImagePreview(index, number, image.width, image.height, jpeg=encode_jpeg(image))
        except Exception as error:
            failure_of(error)  # the request goes on, and with it the call
            return
        with self._lock:
            if self._is_open(request.job):
                self._emit([(request.job.id, preview)])

    def _deliver(self, item: BatchItem, image: Image.Image) -> None:
        request, index = item
        if not self._is_open(request.job):
            return
        try:
            if request.source:
                image = paste_back(image, request.source)
            ready = ImageReady(index, request.seed(index), image.width, image.height, png=encode_png(image))
        except Exception as error:
            self._end(request.job, failure_of(error))
            return
        with self._lock:
            self._steps += 1
            request.undelivered -= 1
            if self._is_open(request.job):
                try:
                    self._emit([(request.job.id, ready)])
                except Exception:
                    # the image is lost; the engine goes on with the other requests
                    log.exception("emit failed for an image")
                    self._end(request.job, Failed.of(EngineError()))
            if request.undelivered == 0:
                self._end(request.job, Finished())

    # All threads

    def _count_step(self, *_: int) -> None:
        with self._lock:
            self._steps += 1

    def _count_operation(self) -> None:
        # Without the lock, which thousands of operations in a step need not wait for: one thread runs calls.
        self._operations += 1

    def _is_open(self, job: ImageJob) -> bool:
        return self._open.get(job.id) is job

    def _end(self, job: ImageJob, event: Failed | Finished) -> None:
        """Send the terminal event of a job, unless it has ended already."""
        with self._lock:
            if self._is_open(job):
                del self._open[job.id]
                self._running.discard(job.id)
                self._queue.discard(job)
                self._emit([(job.id, event)])
