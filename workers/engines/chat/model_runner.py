"""One forward pass for everything the scheduler picked: builds the step's plan, runs the model, returns logits."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch

from workers.engines.chat.attention import PagedAttention, Plan, Segment, page_owners
from workers.engines.chat.kv_cache import KVCache


class Chunk(NamedTuple):
    """Tokens of one sequence that one step computes, at positions start.. of `slot`."""

    slot: int
    start: int
    tokens: list[int]
    wants_logits: bool

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class ModelRunner:
    """Runs `model` with keys and values in `cache`."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.pool.device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [chunks that want them, vocabulary] in float32, in the order of the chunks.

        Chunks of one token are decode rows, and stand before longer ones.
        """
        raise NotImplementedError

    def _logits(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        """All tokens as one row through the model; float32 logits of the tokens `outputs`, None: of all."""
        keep = {"logits_to_keep": outputs} if self._keeps_logits and outputs is not None else {}
        out = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep)
        logits: torch.Tensor = out.logits[0]
        if outputs is not None and not self._keeps_logits:
            logits = logits[outputs]
        return logits.float()

    def _tensor(self, values: Any) -> torch.Tensor:
        tensor = torch.as_tensor(values)
        # pinned memory lets the copy run beside the host; on a CPU there is nothing to copy
        return (
            tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
        )


class PortableRunner(ModelRunner):
    """With attention.PagedAttention: for a CPU, and wherever the CUDA path can't be used."""

    def __init__(self, model: Any, cache: KVCache, attention: PagedAttention) -> None:
        super().__init__(model, cache)
        self._attention = attention

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        plan = self._plan(chunks)
        self._attention.plan = plan
        return self._logits(plan.ids, plan.positions, plan.outputs)

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
        owner, visible, newest = page_owners(cache, [c.slot for c in decode], [c.end for c in decode])
        packed = self._tensor(np.array([ids, positions, pages, offsets]))
        of_pages = self._tensor(np.stack([owner, visible, newest]))
        return Plan(
            ids=packed[0],
            positions=packed[1],
            pages=packed[2],
            offsets=packed[3],
            decode_rows=rows,
            segments=segments,
            outputs=self._tensor(np.array(outputs, np.int64)) if len(outputs) < len(ids) else None,
            owner=of_pages[0],
            visible=of_pages[1],
            newest=of_pages[2],
        )
