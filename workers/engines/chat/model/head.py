"""The product that gives a step's logits, into memory that is kept.

For 64 rows of 128,256 tokens they are 31 MiB. Memory of that size goes back to the system when it is freed:
each step would wait for 8,000 new pages, as long as for the product itself (docs/adr/0004-chat-engine.md).
"""

import torch

from workers.engines.chat.model.linear import linear_product

BLOCK = 16_384
"""Tokens whose logits are computed together on a CPU, since the product allocates its result. Smaller blocks
are slower for one row; 64 rows of this one take 4 MiB."""

KEPT = 128 * 2**20
"""Bytes of memory that is kept, at most: as much as steps so far have written. Only steps of some hundred
rows have more logits; scored prompts are divided into steps (sampling/scoring.py)."""


class Head:
    """Computes logits from the output embedding."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        """weight [vocabulary, width], bias [vocabulary]. dtype: of the logits."""
        self._vocabulary, self._dtype = len(weight), dtype
        # on a GPU torch keeps what is freed
        self._keeps = weight.device.type == "cpu"
        block = BLOCK if self._keeps else self._vocabulary
        self._blocks = []
        for start in range(0, self._vocabulary, block):
            tokens = slice(start, min(start + block, self._vocabulary))
            own_bias = None if bias is None else bias[tokens]
            self._blocks.append((tokens, linear_product(weight[tokens], own_bias)))
        rows = KEPT // (dtype.itemsize * self._vocabulary) if self._keeps else 0
        # takes no memory until it is written
        self._kept = torch.empty(rows, self._vocabulary, dtype=dtype, device=weight.device)

    def room(self, rows: int) -> torch.Tensor:
        """Return memory for logits [rows, vocabulary], which the next call may return again."""
        if rows > len(self._kept):
            return self._kept.new_empty(rows, self._vocabulary)
        return self._kept[:rows]

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of x [rows, width], in `out` if that is given."""
        if out is None and not self._keeps:
            ((_, product),) = self._blocks
            return product(x).to(self._dtype)
        if out is None:
            out = self.room(len(x))
        for tokens, product in self._blocks:
            out[:, tokens] = product(x)
        return out
