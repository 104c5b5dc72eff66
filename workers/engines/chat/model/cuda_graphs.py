"""Decode steps replayed as CUDA graphs, around a ModelRunner.

A graph is a recorded forward pass with fixed shapes and addresses. A replay overwrites the block of memory
that the recorded pass reads with the step's input, and skips the launch of each kernel from Python. Not run
on a GPU in this repository's tests: these replace the graph with one that repeats the recorded operations.
"""

import itertools
import logging
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.model.runner import DecodeStep, ModelRunner, model_input
from workers.engines.chat.sequence import Chunk

log = logging.getLogger(__name__)


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    block: torch.Tensor
    """uint8: the packed arrays that the graph reads."""
    ids: torch.Tensor
    """int64 [rows], a part of the block: the model's input ids."""


class CudaGraphs:
    """Implements Runner: replays decode steps of a recorded size, and passes all others to `runner`."""

    def __init__(self, runner: ModelRunner, attention: FlashPagedAttention, padding_slot: int) -> None:
        self._runner = runner
        self._attention = attention
        self._padding = Chunk(padding_slot, 0, [0], True)
        """A row that fills up a graph's shape."""
        self._sizes: list[int] = []
        """Recorded numbers of rows, in ascending order. Empty until `capture` has returned."""
        self._recordings: dict[tuple[int, int], _Recording] = {}
        """By number of rows and bound on the context."""
        self._logits = torch.empty(0)
        """float32 [largest size, vocabulary]: all graphs write here. Valid until the next replay."""

    @torch.inference_mode()
    def capture(self, max_batch: int) -> None:
        """Record decode steps of 1, 2, 4, 8, 16, 24, ... `max_batch` rows, for each bound on the context.

        Raises RuntimeError if the model can't be recorded.
        """
        sizes = recorded_sizes(max_batch)
        memory = None
        # the largest first: the smaller ones then fit into its memory
        for size, bound in itertools.product(reversed(sizes), reversed(self._attention.bounds)):
            block = self._runner.uploads.packed(arrays := self._arrays([self._padding] * size, bound))
            static = block.to(self._attention.device)
            inputs = self._runner.uploads.views(static, arrays)
            # outside a graph first: this selects kernels and allocates workspaces
            logits = self._runner.run(inputs)
            if not len(self._logits):
                self._logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._logits[:size].copy_(self._runner.run(inputs))
            memory = memory or graph.pool()
            self._recordings[size, bound] = _Recording(graph, static, inputs[0][0])
        self._sizes = sizes
        log.info("CUDA graphs recorded for decode steps of %s rows", ", ".join(map(str, sizes)))

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], ids: torch.Tensor | None = None) -> torch.Tensor:
        """Implements Runner.forward."""
        # a recording has one row for each sequence, and gives the logits of all
        if all(len(chunk.tokens) == 1 and chunk.wants_logits for chunk in chunks):
            size = next((size for size in self._sizes if size >= len(chunks)), None)
            if size is not None:
                return self._replay(size, self._attention.bound_of(chunks), chunks, ids)
        return self._runner.forward(chunks, ids)

    def decode_steps(self) -> list[DecodeStep]:
        """Implements Runner.decode_steps: a replay of each recording."""
        return [
            DecodeStep(f"rows: {size}, contexts: up to {bound}", size, partial(self._replay, size, bound))
            for size, bound in self._recordings
        ]

    def _replay(
        self, size: int, bound: int, chunks: list[Chunk], ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        recording = self._recordings[size, bound]
        arrays = self._arrays(chunks + [self._padding] * (size - len(chunks)), bound)
        recording.block.copy_(self._runner.uploads.packed(arrays), non_blocking=True)
        if ids is not None:
            recording.ids[: len(chunks)].copy_(ids)
        recording.graph.replay()
        return self._logits[: len(chunks)]

    def _arrays(self, rows: list[Chunk], bound: int) -> list[np.ndarray]:
        return [*model_input(rows), *self._attention.prepare(rows, bound)]


def recorded_sizes(max_batch: int) -> list[int]:
    """Numbers of rows: steps of 8 up to 64, then of 16."""
    sizes = (1, 2, 4, 8, *range(16, 64, 8), *range(64, max_batch, 16))
    return [*(size for size in sizes if size < max_batch), max_batch]
