"""Counters of the engine, for tests and benchmarks. Written by the engine thread only."""

from dataclasses import dataclass, field

from workers.engines.token_gaps import TokenGaps


@dataclass(slots=True)
class Metrics:
    """Counts since the start. Seconds are those of a monotonic clock."""

    steps: int = 0
    """Forward passes, of decode rows, prompts or both."""
    decode_steps: int = 0
    """Forward passes with at least one decode row."""
    decoded_rows: int = 0
    """Sum of decode rows over all steps. Divided by decode_steps: the mean batch."""
    max_batch: int = 0
    """Largest number of decode rows in one step."""
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    prompt_tokens: int = 0
    """Tokens of the prompts that have been computed, each prompt once, those of the prefix cache included."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    output_tokens: int = 0
    drafts: int = 0
    """Tokens that speculative decoding guessed."""
    accepted_drafts: int = 0
    preemptions: int = 0
    failures: int = 0
    """Requests that ended with engine_error or out_of_memory."""
    active_pages: int = 0
    """Pages of the KV cache that running sequences hold now."""
    step_seconds: float = 0.0
    """Time inside steps, forward passes included."""
    token_gaps: TokenGaps = field(default_factory=TokenGaps)
    image_layers: int = 0
    """Layers of the vision tower computed: an image may take longer than any step."""
    model_seconds: float = 0.0
    """Time inside the runner's forward passes. On a GPU they return before the device has finished."""

    @property
    def progress(self) -> int:
        """Grows while the engine computes anything."""
        return self.steps + self.image_layers

    def count_image_layer(self) -> None:
        self.image_layers += 1
