"""What the engine counts about itself: read by tests, benchmarks and /metrics. Written by the engine thread only."""

from dataclasses import dataclass


@dataclass(slots=True)
class Metrics:
    """Counters since the start; seconds by a monotonic clock."""

    steps: int = 0
    """Forward passes, of whatever mixture."""
    decode_steps: int = 0
    """Forward passes with at least one decode row."""
    decoded_rows: int = 0
    """Decode rows over all steps: divided by decode_steps, the mean batch."""
    max_batch: int = 0
    """Most decode rows seen in one step."""
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    output_tokens: int = 0
    preemptions: int = 0
    failures: int = 0
    """Requests that ended with engine_error or out_of_memory."""
    active_pages: int = 0
    """Pages of the KV cache that running sequences hold now."""
    step_seconds: float = 0.0
    """Time inside steps, the model included."""
    model_seconds: float = 0.0
    """Time inside the model's forward pass."""
