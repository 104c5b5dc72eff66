"""Forward passes on a GPU: FlashAttention over the pages, decode steps replayed as CUDA graphs.

Nothing in a step waits for the device: inputs go over in pinned memory, and the sampler's copy of the chosen tokens is
the one synchronisation. assembly.py checks this path's output against the model's own at load, with and without graphs,
and serves through the portable path where it can't be used. Not run on a GPU in this repository's tests: these put a
plain function in the place of `varlen_attn` and check everything around it.
"""

import logging
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from workers.engines.chat.attention.base import LayerCall, ModelAttention, UnsupportedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.runner import Chunk, Forward, ModelRunner

log = logging.getLogger(__name__)


@dataclass(slots=True)
class FlashPlan:
    """One step's tokens, sequence after sequence, as FlashAttention's varlen kernel wants them."""

    ids: torch.Tensor
    """int64 [tokens]"""
    positions: torch.Tensor
    """int64 [tokens]"""
    pages: torch.Tensor
    """int64 [tokens]: page each token's key and value go to."""
    offsets: torch.Tensor
    """int64 [tokens]: place inside that page."""
    outputs: torch.Tensor
    """int64 [wanted]: tokens whose logits are wanted."""
    query_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_lengths: torch.Tensor
    """int32 [sequences]"""
    block_table: torch.Tensor
    """int32 [sequences, most pages of a sequence]"""
    longest_query: int
    longest_key: int


class FlashPagedAttention(ModelAttention):
    """Attention over a token-major cache. `plan` is set before each forward pass."""

    plan: FlashPlan

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        if call.softcap is not None:
            raise UnsupportedAttention("it wants attention with softcap")
        plan = self.plan
        keys, values = self._cache.pool[layer, 0], self._cache.pool[layer, 1]
        keys[plan.pages, plan.offsets] = key
        values[plan.pages, plan.offsets] = value
        out = varlen_attn(
            query.contiguous(),
            keys,
            values,
            plan.query_starts,
            plan.key_starts,
            plan.longest_query,
            plan.longest_key,
            scale=call.scale,
            # a window of n keys counts the query's own: n - 1 to its left, none to its right
            window_size=(-1 if call.window is None else call.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=plan.key_lengths,
            block_table=plan.block_table,
        )
        assert isinstance(out, torch.Tensor)
        return out


class CudaRunner(ModelRunner):
    """`ModelRunner` for FlashPagedAttention. `capture` records decode steps of a few batch sizes as CUDA graphs."""

    def __init__(
        self, model_forward: Forward, cache: KVCache, attention: FlashPagedAttention, max_context: int
    ) -> None:
        super().__init__(model_forward, cache)
        self._flash = attention
        self._max_context = max_context
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, FlashPlan, torch.Tensor]] = {}

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [chunks that want them, vocabulary] in float32, in the order of the chunks."""
        # a graph's shapes are fixed: one row for each sequence, all of whose logits are wanted
        if all(len(chunk.tokens) == 1 and chunk.wants_logits for chunk in chunks):
            size = next((size for size in sorted(self._graphs) if size >= len(chunks)), None)
            if size is not None:
                return self._replay(chunks, size)
        return self._run(self._flash_plan(chunks, len(chunks)))

    @torch.inference_mode()
    def capture(self, max_batch: int) -> None:
        """Record decode steps of 1, 2, 4, 8, 16, 24, ... rows. Raises RuntimeError where the model can't be recorded."""
        sizes = sorted(
            {max_batch} | {size for size in (1, 2, 4, 8, *range(16, max_batch, 8)) if size < max_batch}
        )
        memory = None
        for size in reversed(sizes):
            plan = self._flash_plan([], size)
            self._run(plan)  # outside the graph first: kernels are chosen and workspaces made
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                logits = self._run(plan)
            memory = memory or graph.pool()
            self._graphs[size] = (graph, plan, logits)
        log.info("decode steps of %s rows run as CUDA graphs", ", ".join(map(str, sizes)))

    def forget_graphs(self) -> None:
        self._graphs.clear()

    def _replay(self, chunks: list[Chunk], size: int) -> torch.Tensor:
        graph, static, logits = self._graphs[size]
        plan = self._flash_plan(chunks, size)
        for field in fields(FlashPlan):
            target = getattr(static, field.name)
            if isinstance(target, torch.Tensor):
                target.copy_(getattr(plan, field.name), non_blocking=True)
        graph.replay()
        return logits[: len(chunks)]

    def _run(self, plan: FlashPlan) -> torch.Tensor:
        self._flash.plan = plan
        return self.model_forward(plan.ids, plan.positions, plan.outputs).float()

    def _flash_plan(self, chunks: list[Chunk], sequences: int) -> FlashPlan:
        """`sequences` beyond the chunks only fill a graph's shape: one token each, in the cache's scratch page."""
        cache, padding = self._cache, sequences - len(chunks)
        rows: list[tuple[int, int, int, int]] = []
        outputs: list[int] = []
        table = np.full((sequences, cache.pages_for(self._max_context)), cache.num_pages, np.int32)
        for number, chunk in enumerate(chunks):
            for position, token in enumerate(chunk.tokens, chunk.start):
                rows.append((token, position, *cache.place(chunk.slot, position)))
            held = cache.tables[chunk.slot]
            table[number, : len(held)] = held
            if chunk.wants_logits:
                outputs.append(len(rows) - 1)
        for _ in range(padding):
            rows.append((0, 0, cache.num_pages, 0))
            outputs.append(len(rows) - 1)
        queries = np.array([len(chunk.tokens) for chunk in chunks] + [1] * padding)
        keys = np.array([chunk.end for chunk in chunks] + [1] * padding)
        ids, positions, pages, offsets = np.array(rows, np.int64).T
        longest = int(queries.max())
        return FlashPlan(
            ids=self._tensor(ids),
            positions=self._tensor(positions),
            pages=self._tensor(pages),
            offsets=self._tensor(offsets),
            outputs=self._tensor(np.array(outputs, np.int64)),
            query_starts=self._tensor(np.concatenate([[0], queries.cumsum()]).astype(np.int32)),
            key_starts=self._tensor(np.concatenate([[0], keys.cumsum()]).astype(np.int32)),
            key_lengths=self._tensor(keys.astype(np.int32)),
            block_table=self._tensor(table),
            longest_query=longest,
            # a graph replays whatever bound it was recorded with, so decode steps always take the largest
            longest_key=self._max_context if longest == 1 else int(keys.max()),
        )
