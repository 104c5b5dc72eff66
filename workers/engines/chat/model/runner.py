"""One forward pass for everything the scheduler picked: builds the step's plan, runs the model, returns logits."""

import inspect
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from workers.engines.chat.attention.paged import PagedAttention, Plan, Segment, to_device
from workers.engines.chat.cache.kv_cache import KVCache


class Chunk(NamedTuple):
    """Tokens of one sequence that one step computes, at positions start.. of `slot`."""

    slot: int
    start: int
    tokens: list[int]
    wants_logits: bool

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Forward(Protocol):
    """A model's forward pass: ids, positions int64 [tokens], all as one row -> logits [outputs or tokens, vocabulary].

    `outputs`: int64, the tokens whose logits are wanted; None: all.
    """

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor: ...


class ModelForward:
    """`Forward` through transformers' own code."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        keep = {"logits_to_keep": outputs} if self._keeps_logits and outputs is not None else {}
        out = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep)
        logits: torch.Tensor = out.logits[0]
        return logits if outputs is None or self._keeps_logits else logits[outputs]


class ModelRunner:
    """Runs `model_forward` with keys and values in `cache`."""

    def __init__(self, model_forward: Forward, cache: KVCache) -> None:
        self.model_forward = model_forward
        self._cache = cache
        self._device = cache.pool.device

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [chunks that want them, vocabulary] in float32, in the order of the chunks.

        Chunks of one token are decode rows, and stand before longer ones.
        """
        raise NotImplementedError

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self._device)


class PortableRunner(ModelRunner):
    """With paged_attention.PagedAttention: for a CPU, and wherever the CUDA path can't be used."""

    def __init__(self, model_forward: Forward, cache: KVCache, attention: PagedAttention) -> None:
        super().__init__(model_forward, cache)
        self._attention = attention

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        plan = self._plan(chunks)
        self._attention.begin(plan)
        return self.model_forward(plan.ids, plan.positions, plan.outputs).float()

    def _plan(self, chunks: list[Chunk]) -> Plan:
        cache = self._cache
        rows = next((number for number, chunk in enumerate(chunks) if len(chunk.tokens) > 1), len(chunks))
        decode = chunks[:rows]
        ids: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        offsets: list[int] = []
        segments: list[Segment] = []
        outputs: list[int] = []
        for chunk in chunks:
            start = len(ids)
            ids += chunk.tokens
            positions += range(chunk.start, chunk.end)
            for position in range(chunk.start, chunk.end):
                page, offset = cache.place(chunk.slot, position)
                pages.append(page)
                offsets.append(offset)
            if len(chunk.tokens) > 1:
                held = cache.tables[chunk.slot][: cache.pages_for(chunk.end)]
                segments.append(Segment(start, len(ids), chunk.start, self._tensor(np.array(held))))
            if chunk.wants_logits:
                outputs.append(len(ids) - 1)
        packed = self._tensor(np.array([ids, positions, pages, offsets]))
        return Plan(
            ids=packed[0],
            positions=packed[1],
            pages=packed[2],
            offsets=packed[3],
            slots=[chunk.slot for chunk in decode],
            ends=[chunk.end for chunk in decode],
            segments=segments,
            outputs=self._tensor(np.array(outputs, np.int64)) if len(outputs) < len(ids) else None,
        )
