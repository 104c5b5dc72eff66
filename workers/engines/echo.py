"""An engine without a model, which answers with numbers. Fault tests and relay benchmarks use it in place of
a GPU. A vector is VECTOR_SIZE times the length of its input.

`weights = "echo:"` in the catalogue selects it. Options follow as a query string: `step_ms` is the time of
one step (0: as fast as possible), `tokens` the length of a response unless the request sets a lower limit. A
last message that is one of `FAULTS` causes that fault, and so does RAISE_LATER as the prompt of an image.
"""

import io
import struct
import threading
import time
from urllib.parse import parse_qsl

from PIL import Image

from catalogue import ModelEntry
from protocol.errors import Cancelled, DeadlineExceeded, EngineError, OutOfMemory, ShuttingDown
from protocol.events import (
    Delta,
    Echo,
    Event,
    Failed,
    Finished,
    ImagePreview,
    ImageReady,
    Progress,
    Text,
    Tokens,
    Usage,
    Vectors,
)
from protocol.jobs import (
    ChatJob,
    CompletionJob,
    DetokenizeJob,
    EmbeddingJob,
    ImageJob,
    Job,
    TextJob,
    TokenizeJob,
)
from workers.engines.base import CancelReason, Emit, EngineCounts, EngineStatus
from workers.engines.token_gaps import TokenGaps

PREFIX = "echo:"
RAISE_LATER = "raise after three tokens"
FAULTS = ("raise", RAISE_LATER, "out of memory", "hang", "die")
IMAGE_STEPS = 4
SURROGATES = 0xD800
"""The first code that is no character."""
MAX_MODEL_LEN = 1024
"""What it says of itself to /tokenize; it has no limit."""
VECTOR_SIZE = 8


class _Running:
    def __init__(self, job: Job, tokens: int) -> None:
        self.job = job
        self.total = min(job.sampling.max_tokens, tokens) if isinstance(job, TextJob) else IMAGE_STEPS
        self.done = 0
        self.cancelled: CancelReason | None = None


class EchoEngine:
    """Implements workers.engines.base.Engine. One loop advances all jobs together, one step at a time."""

    def __init__(self, entry: ModelEntry) -> None:
        options = dict(parse_qsl(entry.weights.removeprefix(PREFIX)))
        self._step_s = float(options.get("step_ms", 0)) / 1000
        self._tokens = int(options.get("tokens", 100))
        self._emit: Emit = lambda events: None
        self._lock = threading.Condition()
        self._jobs: dict[str, _Running] = {}
        self._steps = 0
        self._prompt_tokens = self._generated = 0
        self._gaps = TokenGaps()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="echo-engine", daemon=True)

    def load(self, emit: Emit) -> None:
        self._emit = emit
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = _Running(job, self._tokens)
            self._lock.notify()

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        with self._lock:
            if running := self._jobs.get(request_id):
                running.cancelled = reason

    def status(self) -> EngineStatus:
        counts = EngineCounts(self._prompt_tokens, self._generated, 0, 0, 0, self._gaps)
        return EngineStatus(self._thread.is_alive(), len(self._jobs), 0, self._steps, counts=counts)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._jobs and not self._closing:
                    self._lock.wait()
                running = list(self._jobs.items())
            if self._closing:
                self._emit([(name, Failed.of(ShuttingDown())) for name, _ in running])
                return
            time.sleep(self._step_s)
            gained = [(name, event) for name, job in running for event in self._step(job)]
            self._steps += 1
            with self._lock:
                for name, event in gained:
                    if isinstance(event, Finished | Failed):
                        del self._jobs[name]
            self._emit(gained)

    def _step(self, running: _Running) -> list[Event]:
        if running.cancelled == "cancelled":
            return [Failed.of(Cancelled())]
        if isinstance(running.job, ImageJob):
            return self._image_step(running, running.job)
        if isinstance(running.job, EmbeddingJob):
            lengths = [float(len(part)) for part in running.job.inputs]
            data = b"".join(struct.pack("<f", length) * VECTOR_SIZE for length in lengths)
            return [Vectors(list(range(len(lengths))), data), Finished(Usage(int(sum(lengths)), 0))]
        if isinstance(running.job, TokenizeJob):
            codes = [ord(character) for character in running.job.text]
            return [Tokens(codes, list(running.job.text), MAX_MODEL_LEN), Finished()]
        if isinstance(running.job, DetokenizeJob):
            return [Text("".join(chr(code % SURROGATES) for code in running.job.tokens)), Finished()]
        return self._text_step(running, running.job)

    def _text_step(self, running: _Running, job: TextJob) -> list[Event]:
        fault = str(job.messages[-1]["content"] if isinstance(job, ChatJob) else job.prompt)
        if fault in FAULTS and not (fault == RAISE_LATER and running.done < 3):
            return self._misbehave(fault)
        size = len(job.messages) if isinstance(job, ChatJob) else len(job.prompt)
        events: list[Event] = []
        if isinstance(job, CompletionJob) and job.echo and not running.done:
            events.append(Echo(fault))
        if running.cancelled == "deadline" or not running.total:
            usage = Usage(size, running.done)
            return [*events, Delta("", tokens=0, finish_reason="length"), Finished(usage)]
        text = f"{running.done} "
        if running.done:
            self._gaps.add(self._step_s, 1)
        else:
            self._prompt_tokens += size
        running.done += 1
        self._generated += 1
        if running.done < running.total:
            return [*events, Delta(text)]
        return [*events, Delta(text, finish_reason="length"), Finished(Usage(size, running.done))]

    def _image_step(self, running: _Running, job: ImageJob) -> list[Event]:
        if running.cancelled == "deadline":
            return [Failed.of(DeadlineExceeded())]
        if job.prompt == RAISE_LATER and running.done == 3:
            return self._misbehave(job.prompt)
        running.done += 1
        progress = Progress(running.done, running.total)
        size = (job.width or 64, job.height or 64)
        if running.done < running.total:
            if running.done > job.partial_images:
                return [progress]
            number, jpeg = running.done - 1, _encoded(size, "navy", "JPEG")
            return [progress, *(ImagePreview(index, number, *size, jpeg=jpeg) for index in range(job.n))]
        png = _encoded(size, "teal", "PNG")
        return [progress, *(ImageReady(index, index, *size, png) for index in range(job.n)), Finished()]

    def _misbehave(self, fault: str) -> list[Event]:
        if fault in ("raise", RAISE_LATER):
            return [Failed.of(EngineError())]
        if fault == "out of memory":
            return [Failed.of(OutOfMemory())]
        if fault == "die":
            raise SystemExit
        threading.Event().wait()
        return []


def _encoded(size: tuple[int, int], colour: str, kind: str) -> bytes:
    """Return an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()
