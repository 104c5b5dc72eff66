"""Puts a loaded model, its cache and everything around them together, warmed up and measured."""

import logging
import time
from dataclasses import dataclass

import torch

from config import ChatEngineOptions, ModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.chat.attention import PagedAttention, register
from workers.engines.chat.cuda_runner import CudaRunner, FlashPagedAttention
from workers.engines.chat.kv_cache import KVCache
from workers.engines.chat.model_loader import (
    CPU_PAGE,
    GPU_PAGE,
    LoadedModel,
    budget_tokens,
    cache_shape,
    check_output,
    load_model,
    wants_flash,
)
from workers.engines.chat.model_runner import Chunk, ModelRunner, PortableRunner
from workers.engines.chat.prefix_cache import PrefixCache
from workers.engines.chat.prompt import PromptBuilder
from workers.engines.chat.sampling import Sampler
from workers.engines.chat.scheduler import BatchScheduler

log = logging.getLogger(__name__)

STALL = 1.5
"""A prefill chunk may lengthen a decode step by this factor: gaps stay under three times the ordinary one."""


@dataclass(slots=True)
class Assembly:
    """The engine's parts. `step_overhead`: how many tokens a forward pass's fixed cost is worth."""

    cache: KVCache
    runner: ModelRunner
    scheduler: BatchScheduler
    sampler: Sampler
    prompts: PromptBuilder
    max_context: int
    step_overhead: float

    def free(self) -> None:
        """Give weights and cache back to the device."""
        del self.runner, self.cache.pool
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prefill_allowance(self, running: int) -> int:
        """Prompt tokens that one step may compute beside `running` decode rows."""
        return int(STALL * (self.step_overhead + running))


def assemble(entry: ModelEntry) -> Assembly:
    """Load and warm up. Raises EngineLoadError."""
    options = entry.engine
    assert isinstance(options, ChatEngineOptions)
    if options.torch_threads is not None:
        torch.set_num_threads(options.torch_threads)
    loaded = load_model(entry)
    cache, runner = _cache_and_runner(loaded, options)
    max_context = min(loaded.max_context, cache.num_pages * cache.page_size)
    prefixes = PrefixCache(cache) if options.prefix_cache else None
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    return Assembly(
        cache=cache,
        runner=runner,
        scheduler=BatchScheduler(cache, prefixes, options.prefill_chunk, _attention_cost(loaded)),
        sampler=Sampler(vocabulary, options.max_batch_size, loaded.device),
        prompts=PromptBuilder(loaded.tokenizer, loaded.model.generation_config, vocabulary, max_context),
        max_context=max_context,
        step_overhead=_measure_overhead(runner, cache, min(options.prefill_chunk, max_context - 1)),
    )


def _cache_and_runner(loaded: LoadedModel, options: ChatEngineOptions) -> tuple[KVCache, ModelRunner]:
    if wants_flash(loaded):
        try:
            return _flash(loaded, options)
        except EngineLoadError as error:
            log.warning("%s; the portable attention is used instead", error)
            torch.cuda.empty_cache()
    cache = _make_cache(loaded, options, CPU_PAGE, token_major=False)
    attention = PagedAttention(cache)
    runner = PortableRunner(loaded.model, cache, attention)
    check_output(loaded, runner, cache, attention, register(attention))
    return cache, runner


def _flash(loaded: LoadedModel, options: ChatEngineOptions) -> tuple[KVCache, ModelRunner]:
    """The CUDA path, checked without and with graphs. Not run in this repository's tests: they have no GPU."""
    cache = _make_cache(loaded, options, GPU_PAGE, token_major=True)
    attention = FlashPagedAttention(cache)
    runner = CudaRunner(loaded.model, cache, attention, min(loaded.max_context, cache.num_pages * GPU_PAGE))
    name = register(attention)
    check_output(loaded, runner, cache, attention, name)
    if options.compile:
        try:
            runner.capture(options.max_batch_size)
            check_output(loaded, runner, cache, attention, name)
        except (EngineLoadError, RuntimeError) as error:
            log.warning("%s: decode runs without CUDA graphs: %s", loaded.name, error)
            runner.forget_graphs()
    return cache, runner


def _make_cache(loaded: LoadedModel, options: ChatEngineOptions, page: int, token_major: bool) -> KVCache:
    shape = cache_shape(loaded, token_major)
    num_pages = max(2, budget_tokens(loaded, shape, options) // page)
    try:
        return KVCache(shape, num_pages, page, options.max_batch_size, loaded.device)
    except (RuntimeError, MemoryError) as error:
        tokens = num_pages * page
        raise EngineLoadError(f"{loaded.name}: no room for a KV cache of {tokens} tokens") from error


def _attention_cost(loaded: LoadedModel) -> float:
    """What attending to one key costs a token, as a share of its pass through all weights.

    By arithmetic operations, twice: attention's small products run at half the speed of the large ones.
    """
    text = loaded.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_one_key = 4 * text.num_hidden_layers * text.num_attention_heads * head_dim
    of_weights = 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    return 2 * of_one_key / of_weights


def _measure_overhead(runner: ModelRunner, cache: KVCache, chunk: int) -> float:
    """Fixed cost of a forward pass, in tokens: from the times of a pass over one token and of one over `chunk`."""

    def seconds(tokens: int) -> float:
        slot = cache.take_slot()
        try:
            cache.grow(slot, tokens)
            times = []
            for _ in range(3):
                started = time.perf_counter()
                runner.forward([Chunk(slot, 0, [0] * tokens, True)]).sum().item()
                times.append(time.perf_counter() - started)
        finally:
            cache.release(slot)
        return min(times)

    one, many = seconds(1), seconds(chunk)
    each = max((many - one) / max(1, chunk - 1), 1e-9)
    return min(max(0.0, one / each - 1), 4096.0)
