"""What follows a transformer in a sentence embedding model: pooling, dense layers and normalization.

Computed in float32: sums over hundreds of hidden states lose too much in 16 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

PoolingMode = Literal["mean", "cls", "last"]


def pool(hidden: Tensor, lengths: Tensor, mode: PoolingMode) -> Tensor:
    """Return one vector for each row, [batch, size] in float32.

    `hidden`: [batch, tokens, size], with padding on the right. `lengths`: [batch], tokens without padding, on
    the same device.
    """
    if mode == "cls":
        return hidden[:, 0].float()
    if mode == "last":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, lengths - 1].float()
    places = torch.arange(hidden.shape[1], device=hidden.device)
    mask = (places < lengths[:, None]).unsqueeze(-1)
    # where, and not a product: a model may leave NaN in padding
    total = torch.where(mask, hidden, 0).sum(1, dtype=torch.float32)
    return total / lengths[:, None]


class Dense(nn.Module):
    """A layer of sentence-transformers: linear, then an activation. In float32."""

    def __init__(self, linear: nn.Linear, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))


@dataclass(frozen=True)
class Head:
    """Makes the vectors of inputs from their hidden states. `source`: where this is said, for the log."""

    pooling: PoolingMode
    dense: tuple[Dense, ...]
    normalize: bool
    source: str

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return [batch, size] in float32, not normalized yet. See `pool`."""
        vectors = pool(hidden, lengths, self.pooling)
        for layer in self.dense:
            vectors = layer(vectors)
        return vectors

    def finish(self, vectors: Tensor, dimensions: int) -> Tensor:
        """Return the first `dimensions` numbers of vectors, [batch, size], normalized if the model's are."""
        vectors = vectors[:, :dimensions]
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def describe(self) -> str:
        """What is done, for the log."""
        layers = f", {len(self.dense)} dense" if self.dense else ""
        normalized = "normalized" if self.normalize else "not normalized"
        return f"{self.pooling} pooling{layers}, {normalized} ({self.source})"
