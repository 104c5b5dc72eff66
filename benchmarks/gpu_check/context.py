"""What the checks share: the device, the models, and the engine that one check loads for the others."""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from benchmarks.gpu_check.models import Target, random_chat
from benchmarks.gpu_check.reference import Reference
from benchmarks.gpu_check.report import Skipped
from benchmarks.gpu_check.streams import Recorder
from benchmarks.gpu_check.texts import Texts
from catalogue import ChatModelEntry
from workers.engines.chat import ChatEngine
from workers.engines.device import choose_device, half_precision
from workers.engines.failures import free_memory


class Work(NamedTuple):
    """How much is computed. All but `prompts` are tokens."""

    prompts: int
    """Number of prompts that are compared with `generate`."""
    new_tokens: int
    longest_row: int
    prompt_tokens: int
    """Of each stream whose speed is measured."""
    window: int
    """Tokens of each stream in the time that is measured."""


GPU_WORK = Work(prompts=50, new_tokens=24, longest_row=2100, prompt_tokens=900, window=64)
"""With some 1,000 tokens of context, for which docs/adr/0004-chat-engine.md has estimates."""
CPU_WORK = Work(prompts=50, new_tokens=24, longest_row=300, prompt_tokens=40, window=16)


class Loaded(NamedTuple):
    """An engine that serves."""

    engine: ChatEngine
    recorder: Recorder
    texts: Texts
    log: list[logging.LogRecord]
    """What the engine said while it was loaded."""


class Context:
    """Handed to each check."""

    def __init__(self, target: Target, folder: Path) -> None:
        """`folder`: where random models are written."""
        self.target = target
        self.folder = folder
        self.device = choose_device()
        self.work = GPU_WORK if self.device.type == "cuda" else CPU_WORK
        self.reference: Reference | None = None
        self._entry = None if target.chat is None else self._of_one_dtype(target.chat)
        self._loaded: Loaded | None = None

    def require_gpu(self) -> None:
        """Raise Skipped on a CPU."""
        if self.device.type != "cuda":
            raise Skipped("no GPU")

    def _of_one_dtype(self, entry: ChatModelEntry) -> ChatModelEntry:
        """On a CPU "auto" is the result of a measurement; the reference needs to know it before the load."""
        if self.device.type == "cuda" or entry.engine.dtype != "auto":
            return entry
        return entry.model_copy(update={"engine": entry.engine.model_copy(update={"dtype": "float32"})})

    @property
    def entry(self) -> ChatModelEntry:
        """The chat model: the one given, or a random one."""
        if self._entry is None:
            if self.target.image is not None:
                raise Skipped("no chat model was given")
            self._entry = random_chat(self.folder, self.device)
        return self._entry

    @property
    def model_name(self) -> str | None:
        """The chat model's name; None before there is one."""
        return None if self._entry is None else self._entry.name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the chat model should be served here."""
        if self.entry.engine.dtype != "auto":
            named: torch.dtype = getattr(torch, self.entry.engine.dtype)
            return named
        return half_precision() if self.device.type == "cuda" else torch.float32

    @property
    def loaded(self) -> Loaded:
        """The engine of the chat model. Raises Skipped unless `load` has succeeded."""
        if self._loaded is None:
            raise Skipped("the chat model is not loaded")
        return self._loaded

    def load(self) -> Loaded:
        """Load the engine of the chat model. Raises EngineLoadError."""
        self._loaded = load_engine(self.entry)
        return self._loaded

    def close(self) -> None:
        """Free the engine's memory, and the disk space of a random model."""
        if self._loaded is not None:
            self._loaded.engine.close()
            self._loaded = None
        if self._entry is not None and self.target.chat is None:
            shutil.rmtree(self._entry.weights)
        free_memory()


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def load_engine(entry: ChatModelEntry) -> Loaded:
    """Load an engine and keep its log. Raises EngineLoadError."""
    engine, recorder, handler = ChatEngine(entry), Recorder(), _Records()
    logger = logging.getLogger("workers.engines.chat")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        engine.load(recorder)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    recorder.follow(engine)
    tokenizer = AutoTokenizer.from_pretrained(entry.weights, revision=entry.revision, trust_remote_code=False)
    return Loaded(engine, recorder, Texts(tokenizer), handler.records)
