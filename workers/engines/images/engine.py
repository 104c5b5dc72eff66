"""The picture engine's two threads: one runs pipelines, call after call; one decodes sources and encodes results.

A request is prepared, waits, is drawn in one or more calls together with compatible ones, and ends with exactly one
terminal event: whoever takes it out of `_requests` sends that event, nobody else can.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from catalogue import ImageEngineOptions, ModelEntry
from protocol.errors import Cancelled, DeadlineExceeded, ShuttingDown
from protocol.events import Event, Failed, Finished, ImageReady, Progress
from protocol.jobs import ImageJob, Job
from workers.engines.base import CancelReason, Emit, EngineLoadError, EngineStatus
from workers.engines.failures import failure_of, free_memory
from workers.engines.images.loader import Pipelines, load_pipelines
from workers.engines.images.pixels import encode_png, paste_back
from workers.engines.images.request import Request, warm_up_requests

_GATHER_S = 0.01
"""How long a call that isn't full waits for the rest of a burst; a request alone pays this once."""

_SHUTTING_DOWN = Failed.of(ShuttingDown())
_ENDS: dict[CancelReason, Failed] = {
    "cancelled": Failed.of(Cancelled()),
    "deadline": Failed.of(DeadlineExceeded()),
}

log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """Picture `number` of a request, from 0."""

    request: Request
    number: int


class _NobodyWaits(Exception):
    """Every request of the running call has ended."""


class ImageEngine:
    """Draws and edits pictures with one model (the `Engine` of workers.engines.base)."""

    def __init__(self, entry: ModelEntry) -> None:
        assert isinstance(entry.engine, ImageEngineOptions)
        self._entry = entry
        self._max_batch_size = entry.engine.max_batch_size
        self._pipelines: Pipelines | None = None
        self._emit: Emit = lambda events: None
        self._lock = threading.RLock()  # held while emitting, too, so that nothing follows a terminal event
        self._work = threading.Condition(self._lock)
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._steps = 0
        self._pixels = ThreadPoolExecutor(1, thread_name_prefix="picture-pixels")
        self._thread = threading.Thread(target=self._serve, name="picture-engine", daemon=True)

    def load(self, emit: Emit) -> None:
        """Load the weights, run one step of all that the model can do, and start. Raises EngineLoadError."""
        self._emit = emit
        self._pipelines = load_pipelines(self._entry)
        try:
            for request in warm_up_requests(self._entry.name, self._pipelines):
                request.pipeline(request.recipe, [request.piece(0)], self._count_step)
        except Exception as error:
            raise EngineLoadError(
                f"{self._entry.name}: warm-up failed: {type(error).__name__}: {error}"
            ) from error
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job and return at once; a second job with the id of a live one is ignored."""
        assert isinstance(job, ImageJob)
        request = Request(job)
        with self._lock:
            if job.id in self._requests:
                log.warning("request %s was submitted twice", job.id)
                return
            self._requests[job.id] = request
            if self._closed:
                self._end(request, _SHUTTING_DOWN)
            elif job.task == "edit":
                self._pixels.submit(self._prepare, request)
            else:  # nothing to decode: needn't stand behind other requests' pixels
                self._prepare(request)

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """End a job now; the running call drops its pictures, or stops at its next step if they were all."""
        with self._lock:
            if request := self._requests.get(request_id):
                self._end(request, _ENDS[reason])

    def status(self) -> EngineStatus:
        """A snapshot without locks: a request counts as running from its first call until its end."""
        started = [request.started for request in list(self._requests.values())]
        return EngineStatus(self._thread.is_alive(), sum(started), len(started) - sum(started), self._steps)

    def close(self) -> None:
        """Fail what is left with "shutting_down", stop both threads and free the device."""
        with self._work:
            self._closed = True
            for request in list(self._requests.values()):
                self._end(request, _SHUTTING_DOWN)
            self._work.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=10)  # a hung device must not hold up the end of the process
        self._pixels.shutdown(wait=False, cancel_futures=True)
        self._pipelines = None
        free_memory()

    # What the engine thread does

    def _serve(self) -> None:
        while batch := self._next_batch():
            self._draw(batch)

    def _next_batch(self) -> list[Picture]:
        """Pictures for one call, oldest request first; blocks until there are some. Empty when closed."""
        with self._work:
            deadline = None
            while not self._closed:
                self._waiting = deque(request for request in self._waiting if self._lives(request))
                batch = self._compatible()
                deadline = deadline or (time.monotonic() + _GATHER_S if batch else None)
                if batch and (self._is_full(batch) or time.monotonic() >= (deadline or 0)):
                    self._take(batch)
                    return batch
                self._work.wait(timeout=deadline and max(0.0, deadline - time.monotonic()))
            return []

    def _compatible(self) -> list[Picture]:
        """The oldest request's undrawn pictures and those of others with its recipe, as many as one call takes."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        room = self._max_batch_size if first.pipeline.takes_batches else 1
        alike = (request for request in self._waiting if request.recipe == first.recipe)
        return [Picture(request, number) for request in alike for number in request.undrawn][:room]

    def _is_full(self, batch: list[Picture]) -> bool:
        first = batch[0].request
        return len(batch) >= self._max_batch_size or not first.pipeline.takes_batches

    def _take(self, batch: list[Picture]) -> None:
        for request, number in batch:
            request.started = True
            request.undrawn.remove(number)
            if not request.undrawn:
                self._waiting.remove(request)

    def _draw(self, batch: list[Picture]) -> None:
        """One call, and its pictures on their way out; after a failure each picture is tried alone."""
        try:
            images = self._call(batch)
        except _NobodyWaits:
            return
        except Exception as error:
            failure = failure_of(error)  # nothing of `error` may live on: its frames hold the call's tensors
        else:
            for picture, image in zip(batch, images, strict=True):
                picture.request.drawn += 1
                self._deliver_later(picture, image)
            return
        free_memory()
        if len(batch) == 1:
            self._end(batch[0].request, failure)
            return
        # too much for the memory together, or one request spoilt it for the others
        for picture in batch:
            if self._lives(picture.request):
                self._draw([picture])

    def _call(self, batch: Sequence[Picture]) -> list[Image.Image]:
        first = batch[0].request

        def on_step(step: int, total: int) -> None:
            self._count_step()
            if not any(self._lives(request) for request, _ in batch):
                raise _NobodyWaits
            self._report(batch, step, total)

        return first.pipeline(first.recipe, [request.piece(number) for request, number in batch], on_step)

    def _report(self, batch: Sequence[Picture], step: int, total: int) -> None:
        """Progress counts the steps of all pictures of a request: n pictures of 20 steps make 20 n."""
        with self._lock:
            events: list[tuple[str, Event]] = []
            for request in dict.fromkeys(picture.request for picture in batch):
                here = sum(picture.request is request for picture in batch)
                done = request.drawn * total + here * step
                if self._lives(request) and done > request.progress:  # a second try doesn't go backwards
                    request.progress = done
                    events.append((request.job.id, Progress(done, total * request.job.n)))
            if events:
                self._emit(events)

    # What the pixels thread does

    def _prepare(self, request: Request) -> None:
        try:
            if (pipelines := self._pipelines) is None:
                return  # closed, and the request ended with it
            request.prepare(pipelines)
        except Exception as error:
            self._end(request, failure_of(error))
        else:
            with self._work:
                self._steps += 1
                self._waiting.append(request)
                self._work.notify_all()

    def _deliver_later(self, picture: Picture, image: Image.Image) -> None:
        with self._lock:
            if not self._closed:
                self._pixels.submit(self._deliver, picture, image)

    def _deliver(self, picture: Picture, image: Image.Image) -> None:
        request, number = picture
        if not self._lives(request):
            return
        try:
            if request.source:
                image = paste_back(image, request.source)
            ready = ImageReady(number, request.seed(number), image.width, image.height, png=encode_png(image))
        except Exception as error:
            self._end(request, failure_of(error))
            return
        with self._lock:
            self._steps += 1
            request.unsent -= 1
            if self._lives(request):
                self._emit([(request.job.id, ready)])
            if request.unsent == 0:
                self._end(request, Finished())

    # What all threads do

    def _count_step(self, *_: int) -> None:
        with self._lock:
            self._steps += 1

    def _lives(self, request: Request) -> bool:
        return self._requests.get(request.job.id) is request

    def _end(self, request: Request, event: Failed | Finished) -> None:
        with self._lock:
            if self._lives(request):
                del self._requests[request.job.id]
                self._emit([(request.job.id, event)])
