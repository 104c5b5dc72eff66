"""Engines: loaded models that work on jobs. torch and other large libraries are imported when one is
loaded."""

from collections.abc import Sequence

from catalogue import EmbeddingModelEntry, ImageModelEntry, ModelEntry, TextModelEntry
from protocol.jobs import Job
from workers.engines.base import CancelReason, Emit, Engine, EngineStatus
from workers.engines.echo import PREFIX, EchoEngine


class LazyEngine:
    """Implements Engine with the engine of a catalogue entry, which is made when it is loaded.

    Importing torch takes seconds. By then the worker holds its lease and hears a stop.
    """

    def __init__(self, entry: ModelEntry, *, gpus: Sequence[str] = (), gpu_share: float = 1.0) -> None:
        """`gpus`: the UUIDs of those that the driver gives this process.

        `gpu_share`: the part of a GPU's memory that it may use.
        """
        self._entry = entry
        self._gpus = list(gpus)
        self._gpu_share = gpu_share
        self._engine: Engine | None = None

    def load(self, emit: Emit) -> None:
        self._engine = _create_engine(self._entry, self._gpu_share)
        if not isinstance(self._engine, EchoEngine):
            from workers.engines.device import require_gpus

            require_gpus(self._gpus)
        self._engine.load(emit)

    def submit(self, job: Job) -> None:
        """Raises RuntimeError before `load`."""
        if self._engine is None:
            raise RuntimeError(f"request {job.id} came before the engine was loaded")
        self._engine.submit(job)

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        if self._engine is not None:
            self._engine.cancel(request_id, reason)

    def status(self) -> EngineStatus:
        if self._engine is None:
            return EngineStatus(alive=False, running=0, waiting=0, steps=0)
        return self._engine.status()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _create_engine(entry: ModelEntry, gpu_share: float) -> Engine:
    if entry.weights.startswith(PREFIX):
        return EchoEngine(entry)
    match entry:
        case TextModelEntry():
            from workers.engines.chat import ChatEngine

            return ChatEngine(entry, gpu_share)
        case ImageModelEntry():
            from workers.engines.images import ImageEngine

            return ImageEngine(entry)
        case EmbeddingModelEntry():
            from workers.engines.embedding import EmbeddingEngine

            return EmbeddingEngine(entry)
    raise TypeError(f"no engine serves a {type(entry).__name__}")
