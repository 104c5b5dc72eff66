"""Computes the two halves of a step at the same time, each in a thread of its own.

With two threads inside each operation instead, both wait for each other after every operation. On a machine
whose cores have other work too, web processes for example, one of them often has no core, and a step takes
several times as long as with one thread. Halves wait for each other once, at the end of the step.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from workers.engines.chat.model.runner import DecodeStep, ModelRunner
from workers.engines.chat.sequence import Chunk

GAIN = 1.3
"""A step is split if its larger half is by this factor faster than the step, by the estimate."""

TOKEN_S = 200e-6
"""What this process, Redis and the web process do for a token that is sent, about, on the core that the
second half needs: a step of many rows of a small model is slower in halves."""


class StepCosts(NamedTuple):
    """What a step costs, in units of a token's pass through the weights."""

    overhead: float
    """The fixed cost of a forward pass, which both halves have."""
    key: float
    """Attention to one key."""
    row: float
    """What is done for a row that gets a token, TOKEN_S."""


class SplitRunner:
    """Implements Runner with two runners over the same weights and cache.

    Sequences are divided, never the tokens of one: these read each other's keys and values.
    """

    def __init__(self, first: ModelRunner, second: ModelRunner, room: Callable[[int], torch.Tensor]) -> None:
        """`room`: returns memory for a number of rows of logits."""
        self._first, self._second = first, second
        self._room = room
        self._costs = StepCosts(0.0, 0.0, 0.0)
        self._thread = ThreadPoolExecutor(1, "chat-half", initializer=torch.set_num_threads, initargs=(1,))

    def set_costs(self, costs: StepCosts) -> None:
        """Set what is known once the model runs. Before, each step of two sequences is split."""
        self._costs = costs

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], ids: torch.Tensor | None = None) -> torch.Tensor:
        """Implements Runner.forward."""
        middle = self._middle(chunks)
        if not middle:
            return self._first.forward(chunks, ids)
        ids_of = (None, None) if ids is None else (ids[:middle], ids[middle:])
        rows = [chunk.logit_rows for chunk in chunks]
        logits, own = self._room(sum(rows)), sum(rows[:middle])
        other = self._thread.submit(self._second.forward, chunks[middle:], ids_of[1], logits[own:])
        try:
            self._first.forward(chunks[:middle], ids_of[0], logits[:own])
        finally:
            # also after a failure: nothing may use the cache while the other half writes to it
            error = other.exception()
        if error is not None:
            raise error
        return logits

    def decode_steps(self) -> list[DecodeStep]:
        """Implements Runner.decode_steps."""
        return [step._replace(forward=self.forward) for step in self._first.decode_steps()]

    def close(self) -> None:
        """End the second thread."""
        self._thread.shutdown()

    def _middle(self, chunks: Sequence[Chunk]) -> int:
        """Return how many chunks the first half has, or 0 if the step isn't faster in halves."""
        overhead, key, row = self._costs
        costs = [len(chunk.tokens) * (1 + key * chunk.end) for chunk in chunks]
        total, before = sum(costs), 0.0
        best, largest = 0, total
        for at, cost in enumerate(costs[:-1], 1):
            before += cost
            half = max(before, total - before)
            # a sequence's drafts follow it as rows of their own
            if half < largest and chunks[at].slot != chunks[at - 1].slot:
                best, largest = at, half
        sent = row * sum(chunk.wants_logits for chunk in chunks)
        return best if (overhead + largest + sent) * GAIN < overhead + total else 0
