"""Attention over the paged KV cache in float32 on a CPU: two compiled loops a layer, which read each page once."""

import numpy as np
import torch

from workers.engines.chat.attention.base import LayerCall
from workers.engines.chat.attention.paged import PagedAttention, Plan
from workers.engines.chat.kernels.cpu import decode_rows, store_in_pages


class CpuPagedAttention(PagedAttention):
    """`PagedAttention` for a float32 cache in the machine's memory, [pages, kv_heads, page_size, head_dim] a layer."""

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        pool = self._cache.pool.numpy()
        self._pools = [(pool[layer, 0], pool[layer, 1]) for layer in range(pool.shape[0])]
        self._places = plan.pages.numpy(), plan.offsets.numpy()
        held = [self._cache.tables[slot] for slot in plan.slots]
        self._tables = np.zeros((len(held), max(map(len, held), default=0)), np.int64)
        for row, table in enumerate(held):
            self._tables[row, : len(table)] = table
        self._ends = np.array(plan.ends, np.int64)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self._pools[layer]
        store_in_pages(key.contiguous().numpy(), value.contiguous().numpy(), *self._places, keys, values)

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        keys, values = self._pools[layer]
        query = query.contiguous()
        out = torch.empty_like(query)
        scale, window, softcap = np.float32(call.scale), call.window or 0, np.float32(call.softcap or 0)
        decode_rows(
            query.numpy(), keys, values, self._tables, self._ends, scale, window, softcap, out.numpy()
        )
        return out
