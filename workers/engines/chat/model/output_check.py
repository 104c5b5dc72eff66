"""Compares the logits that will be served with the model's own, before the first request.

A model whose attention isn't the standard one (ALiBi, sinks, latent attention, or one not known yet) is
refused by name instead of being served wrongly. A faster way of computing the model that gives other logits
isn't used.

Differences are root mean squares over all compared rows, relative to the logits' standard deviation. In half
precision rounding alone gives 0.004 to 0.3, depending on the model and its depth. What it gives in this model
is measured: by how much the model's own logits change between two attention implementations of transformers.
"""

import itertools
from typing import NamedTuple

import torch

from workers.engines.base import EngineLoadError
from workers.engines.chat.attention.base import ModelAttention, UnsupportedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.loader import LoadedModel, first_line
from workers.engines.chat.model.runner import DecodeStep, Runner
from workers.engines.chat.sequence import Chunk

OTHER_LENGTHS = (22, 17, 13)
"""Numbers of tokens of the prompts that are compared, besides one that is longer than a page.

They are computed together, if the cache has room.
"""

LAST_CHUNK = 16
"""Largest number of prompt tokens in the second chunk. A kernel that computes few queries over many keys may
divide the keys among the multiprocessors, and merge the results wrongly."""

ROUNDING_FACTOR = 2
"""How many times the model's own rounding is accepted: standard attention gives 0.7 to 1.4 times."""


class Limits(NamedTuple):
    """What is accepted as rounding in one dtype."""

    least: float
    """Always accepted: one token that goes to another expert of a mixture may change a row this much."""
    unmeasured: float
    """The limit for models that have no second attention implementation."""
    most: float
    """Never exceeded: a model's second attention implementation may itself not be right."""


MOST_OF_A_STEP = 0.8
"""Never exceeded by a single decode step. A row with another row's logits differs by 1.4."""

LIMITS = {
    torch.float32: Limits(5e-4, 5e-4, 5e-4),
    torch.float16: Limits(5e-3, 2e-2, 0.1),
    torch.bfloat16: Limits(2e-2, 0.15, 0.5),
}

FAILURES = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)
"""What a model raises that can't be run in the way that is tried."""


class OutputCheck:
    """Holds the logits of the unchanged model, computed with its own eager attention when this is created."""

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._loaded = loaded
        self._cache = cache
        self._name = loaded.architecture
        room = min(cache.num_pages * cache.page_size, loaded.max_context) - 1
        # random tokens: they attend to more of each other than those of a regular series or a text, and so
        # show a wrong attention better
        random = torch.Generator().manual_seed(0)
        self._prompts: list[list[int]] = [
            torch.randint(loaded.text_config.vocab_size, (min(length, room),), generator=random).tolist()
            for length in (cache.page_size + 4, *OTHER_LENGTHS)
        ]
        try:
            self._expected = self._own_logits("eager")
        except FAILURES as error:
            raise self._refusal(first_line(error)) from error
        self._spread = self._expected.std().clamp(min=1e-6)
        self._limit = self._measure_limit()

    @torch.inference_mode()
    def __call__(self, runner: Runner) -> None:
        """Run each prompt as a prefill in two chunks and two decode rows; then each of the runner's decode
        steps.

        Raises EngineLoadError if the runner can't run it or its output differs.
        """
        cache = self._cache
        pages = sum(cache.pages_for(len(ids)) for ids in self._prompts)
        together = len(self._prompts) <= cache.num_free_slots and pages <= cache.num_free_pages
        numbers = range(len(self._prompts))
        groups = [list(numbers)] if together else [[number] for number in numbers]
        try:
            found = torch.cat([self._served_logits(runner, group) for group in groups])
        except (UnsupportedAttention, *FAILURES) as error:
            raise self._refusal(first_line(error)) from error
        self._judge(found, self._expected, self._limit)

    def _own_logits(self, attention: str) -> torch.Tensor:
        """Compute the model's logits, float32 [prompts, ends, vocabulary], with transformers' `attention`.

        Leaves the model with that attention.
        """
        model, rows = self._loaded.model, []
        model.set_attn_implementation(attention)
        for ids in self._prompts:
            logits = model(input_ids=torch.tensor([ids], device=self._loaded.device), use_cache=False).logits
            rows.append(logits[0, [end - 1 for end in _ends(ids)]].float())
        return torch.stack(rows)

    def _served_logits(self, runner: Runner, numbers: list[int]) -> torch.Tensor:
        """Compute the runner's logits, float32 [prompts, ends, vocabulary], for some prompts together.

        Raises EngineLoadError if the runner's decode steps give others.
        """
        cache, prompts = self._cache, [self._prompts[number] for number in numbers]
        slots = [cache.take_slot() for _ in prompts]
        try:
            for slot, ids in zip(slots, prompts, strict=True):
                cache.grow(slot, len(ids))
            rows, starts = [], [0] * len(prompts)
            for ends in zip(*map(_ends, prompts), strict=True):
                parts = zip(slots, prompts, starts, ends, strict=True)
                chunks = [Chunk(slot, start, ids[start:end], True) for slot, ids, start, end in parts]
                rows.append(runner.forward(chunks).clone())
                starts = list(ends)
            for first, step in enumerate(runner.decode_steps()):
                self._check_step(step, first, dict(zip(numbers, slots, strict=True)))
        finally:
            for slot in slots:
                cache.release(slot)
        return torch.stack(rows, 1)

    def _check_step(self, step: DecodeStep, first: int, slots: dict[int, int]) -> None:
        """Compute one decode step, in which rows attend to contexts of different lengths.

        Its rows are tokens that were compared before, from the `first` one on, so that a step that leaves the
        result of the step before it is noticed. slots: by the number of a prompt, where its keys and values
        are. Raises EngineLoadError.
        """
        compared = list(itertools.product(range(self._expected.shape[1]), slots))
        rows = [compared[(first + row) % len(compared)] for row in range(step.rows)]
        chunks = []
        for end, number in rows:
            ids = self._prompts[number]
            last = _ends(ids)[end] - 1
            chunks.append(Chunk(slots[number], last, [ids[last]], True))
        logits = step.forward(chunks)
        # in parts, so that a large step needs little memory
        for start in range(0, step.rows, len(compared)):
            part = slice(start, start + len(compared))
            ends, prompts = zip(*rows[part], strict=True)
            expected = self._expected[list(prompts), list(ends)]
            # the limit is for all that is compared: a few rows may have most of the difference
            few = (self._expected[..., 0].numel() / len(ends)) ** 0.5
            limit = min(self._limit * few, max(self._limit, MOST_OF_A_STEP))
            self._judge(logits[part], expected, limit, f" in a decode step ({step.name})")

    def _judge(self, found: torch.Tensor, expected: torch.Tensor, limit: float, where: str = "") -> None:
        """Raise EngineLoadError if logits differ by more than `limit`."""
        difference = self._difference(found, expected)
        if not difference < limit:
            raise self._refusal(
                f"its attention is not the standard one{where} (logits differ by {difference:.2g} of their"
                f" standard deviation, rounding explains {limit:.2g})"
            )

    def _measure_limit(self) -> float:
        """The largest difference that rounding explains in this model."""
        limits = LIMITS.get(self._loaded.model.dtype, LIMITS[torch.bfloat16])
        if limits.least == limits.most:
            return limits.most
        try:
            rounding = self._difference(self._own_logits("sdpa"), self._expected)
        except FAILURES:
            return limits.unmeasured
        return min(max(limits.least, ROUNDING_FACTOR * rounding), limits.most)

    def _difference(self, logits: torch.Tensor, expected: torch.Tensor) -> float:
        return float((logits - expected).square().mean().sqrt() / self._spread)

    def windows(self, attention: ModelAttention) -> None:
        """Raise EngineLoadError unless each sliding layer passed its window to attention.

        A window that is wider than the compared prompt doesn't show in the logits.
        """
        kinds = getattr(self._loaded.text_config, "layer_types", None) or ()
        expected = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
        if not expected <= {layer for layer, call in attention.layers.items() if call.window is not None}:
            raise EngineLoadError(f"{self._name} hides its sliding window from attention")

    def _refusal(self, reason: str) -> EngineLoadError:
        return EngineLoadError(f"{self._name} can't be served: {reason}")


def _ends(ids: list[int]) -> list[int]:
    """The lengths of a prompt after each of its parts: two prefill chunks and two tokens."""
    length = len(ids)
    return [max(length // 2, length - 2 - LAST_CHUNK), length - 2, length - 1, length]
