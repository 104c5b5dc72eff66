"""Observes a pipeline call operation by operation, and keeps each of them short.

One step of a large image can take longer than an engine may go without a sign of life (HANG_S). Each torch
operation of a call is such a sign, and the points between them are where a call without readers is ended.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_PIECE = 2**27
"""Attention scores that a CPU computes in one operation: about a second on one slow core."""


class ObservedOperations(TorchFunctionMode):
    """A context in which `on_operation()` follows each torch operation of this thread.

    An exception that it raises ends the call. On a CPU, attention with many scores runs in several
    operations: for a large image it takes minutes, and nothing could be seen meanwhile.
    """

    def __init__(self, on_operation: Callable[[], None]) -> None:
        super().__init__()
        self._on_operation = on_operation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            result = self._attention(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self._on_operation()
        return result

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Compute attention in pieces of queries.

        Shapes: (..., queries, channels) and (..., keys, channels).
        """
        queries = query.shape[-2]
        scores_of_one = math.prod(query.shape[:-2]) * key.shape[-2]
        rows = max(1, _PIECE // scores_of_one)
        if query.device.type != "cpu" or is_causal or rows >= queries:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        pieces = []
        for start in range(0, queries, rows):
            piece = slice(start, start + rows)
            mask = attn_mask
            if mask is not None and mask.shape[-2] == queries:
                mask = mask[..., piece, :]
            pieces.append(
                scaled_dot_product_attention(
                    query[..., piece, :], key, value, mask, dropout_p, is_causal, **options
                )
            )
            self._on_operation()
        return torch.cat(pieces, dim=-2)
