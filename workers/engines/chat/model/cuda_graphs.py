"""Decode steps replayed as CUDA graphs, around a ModelRunner.

A graph is a recorded forward pass with fixed shapes and addresses. A replay overwrites the tensors that the
recorded pass reads with those of the step, and skips the launch of each kernel from Python. Not run on a GPU
in this repository's tests: these replace the graph with one that repeats the recorded operations.
"""

import logging
from typing import NamedTuple, Protocol

import torch

from workers.engines.chat.model.runner import ModelInput, ModelRunner
from workers.engines.chat.sequence import Chunk

log = logging.getLogger(__name__)


class StaticAttention(Protocol):
    """An attention whose metadata for a decode step is a fixed set of tensors with fixed shapes."""

    def buffers(self) -> list[torch.Tensor]:
        """The tensors of the metadata that was prepared last."""


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffers: list[torch.Tensor]
    """All that the graph reads."""
    logits: torch.Tensor
    """float32 [rows, vocabulary]: where each replay writes its result."""


class CudaGraphs:
    """Implements Runner: replays decode steps of a recorded size, and passes all others to `runner`."""

    def __init__(self, runner: ModelRunner, attention: StaticAttention, padding_slot: int) -> None:
        self._runner = runner
        self._attention = attention
        self._padding = Chunk(padding_slot, 0, [0], True)
        """A row that fills up a graph's shape."""
        self._recordings: dict[int, _Recording] = {}
        """By number of rows, in ascending order once `capture` has returned."""

    @torch.inference_mode()
    def capture(self, max_batch: int) -> None:
        """Record decode steps of 1, 2, 4, 8, 16, 24, ... `max_batch` rows.

        Raises RuntimeError if the model can't be recorded.
        """
        sizes = {max_batch} | {size for size in (1, 2, 4, 8, *range(16, max_batch, 8)) if size < max_batch}
        memory = None
        recordings = {}
        # the largest first: the smaller ones then fit into its memory
        for size in sorted(sizes, reverse=True):
            inputs = self._runner.prepare([self._padding] * size)
            # outside a graph first: this selects kernels and allocates workspaces
            self._runner.run(inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                logits = self._runner.run(inputs)
            memory = memory or graph.pool()
            recordings[size] = _Recording(graph, self._buffers(inputs), logits)
        self._recordings = dict(sorted(recordings.items()))
        log.info("CUDA graphs recorded for decode steps of %s rows", ", ".join(map(str, self._recordings)))

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Implements Runner.forward."""
        # a recording has one row for each sequence, and gives the logits of all
        if all(len(chunk.tokens) == 1 and chunk.wants_logits for chunk in chunks):
            size = next((size for size in self._recordings if size >= len(chunks)), None)
            if size is not None:
                return self._replay(self._recordings[size], chunks, size)
        return self._runner.forward(chunks)

    def _replay(self, recording: _Recording, chunks: list[Chunk], size: int) -> torch.Tensor:
        inputs = self._runner.prepare(chunks + [self._padding] * (size - len(chunks)))
        for static, current in zip(recording.buffers, self._buffers(inputs), strict=True):
            static.copy_(current, non_blocking=True)
        recording.graph.replay()
        return recording.logits[: len(chunks)]

    def _buffers(self, inputs: ModelInput) -> list[torch.Tensor]:
        assert inputs.outputs is None, "a decode step wants the logits of all its tokens"
        return [inputs.ids, inputs.positions, *self._attention.buffers()]
