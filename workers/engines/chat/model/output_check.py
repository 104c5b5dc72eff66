"""Compares the logits that will be served with the model's own, before the first request.

A model whose attention isn't the standard one (ALiBi, sinks, latent attention, or one not known yet) is
refused by name instead of being served wrongly. A faster way of computing the model that gives other logits
isn't used.
"""

import torch

from workers.engines.base import EngineLoadError
from workers.engines.chat.attention.base import ModelAttention, UnsupportedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.loader import LoadedModel, first_line
from workers.engines.chat.model.runner import Runner
from workers.engines.chat.sequence import Chunk

TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to their standard deviation, that rounding explains."""

PROMPT = 24
"""Number of tokens of the prompt that is compared."""


class OutputCheck:
    """Holds the logits of the unchanged model, computed with its own eager attention when this is created."""

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._loaded = loaded
        self._cache = cache
        self._name = type(loaded.model).__name__
        model, vocabulary = loaded.model, loaded.text_config.vocab_size
        count = min(PROMPT, cache.num_pages * cache.page_size - 1, loaded.max_context - 1)
        self._ids = [(7 * place + 3) % vocabulary for place in range(count)]
        try:
            model.set_attn_implementation("eager")
            ids = torch.tensor([self._ids], device=loaded.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise self._refusal(first_line(error)) from error
        self._expected = logits[[count // 2 - 1, count - 2, count - 1]]

    @torch.inference_mode()
    def __call__(self, runner: Runner) -> None:
        """Run a prefill in two chunks and one decode row.

        Raises EngineLoadError if it can't run or its output differs.
        """
        cache, ids = self._cache, self._ids
        first = len(ids) // 2
        slot = cache.take_slot()
        try:
            cache.grow(slot, len(ids))
            parts = [Chunk(slot, 0, ids[:first], True), Chunk(slot, first, ids[first:-1], True)]
            parts.append(Chunk(slot, len(ids) - 1, ids[-1:], True))
            found = torch.cat([runner.forward([part]) for part in parts])
        except (
            UnsupportedAttention,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
            IndexError,
        ) as error:
            raise self._refusal(first_line(error)) from error
        finally:
            cache.release(slot)
        difference = (found - self._expected).abs().max() / self._expected.std().clamp(min=1e-6)
        if not bool(difference < TOLERANCE.get(self._loaded.model.dtype, 1e-1)):
            raise self._refusal("its attention is not the standard one")

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
