"""Generates something small before the worker serves, to find a model that is broken."""

import io
import threading
from collections.abc import Callable, Sequence

from PIL import Image

from catalogue import CHAT, COMPLETION, EDIT, EMBEDDING, GENERATION, ModelEntry
from protocol.errors import OutOfMemory
from protocol.events import Event, Failed, is_terminal
from protocol.jobs import ChatJob, CompletionJob, EmbeddingJob, ImageJob, Job, SamplingParams
from workers.engines.base import Emit, Engine, EngineLoadError, TemporaryLoadError

CANARY_ID = "canary"
CANARY_S = 600


class SwitchableEmit:
    """The `emit` of an engine; its `target` is the canary at first, then the event sender."""

    def __init__(self) -> None:
        self.target: Emit = lambda gained: None

    def __call__(self, gained: Sequence[tuple[str, Event]]) -> None:
        self.target(gained)


def run_canary(engine: Engine, entry: ModelEntry, emit: SwitchableEmit) -> None:
    """Generate something small and wait for its end; `emit` is that of the engine.

    Raises EngineLoadError if the generation fails or takes longer than CANARY_S.
    """
    ended = threading.Event()
    last: list[Event] = []

    def listen(gained: Sequence[tuple[str, Event]]) -> None:
        for request_id, event in gained:
            if request_id == CANARY_ID and is_terminal(event):
                last.append(event)
                ended.set()

    emit.target = listen
    engine.submit(_job(entry))
    if not ended.wait(CANARY_S):
        raise TemporaryLoadError(f"the first generation of {entry.name!r} did not end within {CANARY_S} s")
    if isinstance(last[0], Failed):
        kind = TemporaryLoadError if last[0].code == OutOfMemory.code else EngineLoadError
        raise kind(f"the first generation of {entry.name!r} failed: {last[0].message}")


def _job(entry: ModelEntry) -> Job:
    """A job for the first task of JOBS that the model has."""
    return next(make(entry.name) for task, make in JOBS.items() if task in entry.tasks)


def _chat(model: str) -> Job:
    messages = [{"role": "user", "content": "Hello!"}]
    sampling = SamplingParams(max_tokens=2, temperature=0)
    return ChatJob(id=CANARY_ID, model=model, messages=messages, sampling=sampling)


def _completion(model: str) -> Job:
    sampling = SamplingParams(max_tokens=2, temperature=0)
    return CompletionJob(id=CANARY_ID, model=model, prompt="Hello!", sampling=sampling)


def _generation(model: str) -> Job:
    return ImageJob(
        id=CANARY_ID, model=model, task="generation", prompt="a circle", num_inference_steps=2, seed=0
    )


def _edit(model: str) -> Job:
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(png, "PNG")
    return ImageJob(
        id=CANARY_ID,
        model=model,
        task="edit",
        prompt="a circle",
        num_inference_steps=2,
        seed=0,
        image=png.getvalue(),
    )


def _embedding(model: str) -> Job:
    return EmbeddingJob(id=CANARY_ID, model=model, inputs=["Hello!"])


JOBS: dict[str, Callable[[str], Job]] = {
    CHAT.name: _chat,
    COMPLETION.name: _completion,
    GENERATION.name: _generation,
    EDIT.name: _edit,
    EMBEDDING.name: _embedding,
}
"""Makes a small job for a model, by task."""
