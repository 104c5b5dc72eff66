"""Runs the first passes of a loaded embedding model, and measures what a pass costs."""

import time

from catalogue import EmbeddingModelEntry
from workers.engines.embedding.loader import LoadedEncoder
from workers.engines.load_errors import load_error

LEAST_PASS_COST, MOST_PASS_COST = 16.0, 4096.0
"""In tokens: a measurement on a busy machine may be far off."""


def warm_up(entry: EmbeddingModelEntry, loaded: LoadedEncoder, batch_tokens: int) -> tuple[int, float]:
    """Return the size of the model's vectors, and what a pass costs beside its tokens, in tokens.

    `batch_tokens`: of a pass, with padding. On a GPU a full pass of the longest inputs shows that there is
    memory for it. Raises EngineLoadError.
    """
    length = loaded.max_tokens if loaded.device.type == "cuda" else min(loaded.max_tokens, 16)
    count = max(1, (batch_tokens if loaded.device.type == "cuda" else 256) // length)
    row = [loaded.pad_token] * length
    # a pass of several inputs has no more tokens with its padding either
    padded = [row] * (count - 1) if count > 1 else [row[: batch_tokens // 2]]

    def seconds(inputs: list[list[int]]) -> float:
        started = time.perf_counter()
        loaded.vectors(inputs).cpu()
        return time.perf_counter() - started

    try:
        vectors = loaded.vectors([*padded, row[:1]])
        few, many = (min(seconds(inputs) for _ in range(3)) for inputs in ([row[:8]], [row] * count))
    except Exception as error:
        message = f"warm-up failed: {type(error).__name__}: {error}"
        raise load_error(entry, error, " ".join(message.split())[:400]) from error
    tokens = count * length
    each = max((many - few) / max(1, tokens - 8), 1e-9)
    return vectors.shape[1], min(max(few / each - 8, LEAST_PASS_COST), MOST_PASS_COST)
