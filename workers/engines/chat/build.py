"""Puts a loaded model, its cache and everything around them together, warmed up and measured."""

import logging
import os
import time
from dataclasses import dataclass

import torch

from catalogue import ChatEngineOptions, ChatModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.chat.attention.base import ModelAttention, register
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.cache.prefix_cache import PrefixCache
from workers.engines.chat.model.cuda_graphs import CudaRunner, FlashPagedAttention
from workers.engines.chat.model.fused_decoder import FusedDecoder, JoinedWeights, can_fuse, join_weights
from workers.engines.chat.model.linear import can_pack, pack_linears
from workers.engines.chat.model.loader import (
    CPU_PAGE,
    GPU_PAGE,
    LoadedModel,
    budget_tokens,
    cache_shape,
    load_model,
    wants_flash,
)
from workers.engines.chat.model.output_check import OutputCheck
from workers.engines.chat.model.runner import Chunk, ModelForward, ModelRunner, PortableRunner
from workers.engines.chat.prompt import PromptBuilder
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.scheduler import BatchScheduler

log = logging.getLogger(__name__)

Joined = list[JoinedWeights] | None

COMPILED_ATTENTION_THREADS = 4
"""The compiled loops over keys run in one thread. For 64 rows they take 0.4 of the time of torch's operations in one or
two threads; with many, these are ahead."""


@dataclass(slots=True)
class Assembly:
    """The engine's parts."""

    cache: KVCache
    runner: ModelRunner
    scheduler: BatchScheduler
    sampler: Sampler
    prompts: PromptBuilder
    max_context: int
    torch_threads: int

    def free(self) -> None:
        """Give weights and cache back to the device."""
        del self.runner, self.cache.pool
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def assemble(entry: ChatModelEntry) -> Assembly:
    """Load and warm up. Raises EngineLoadError."""
    options = entry.engine
    torch_threads = options.torch_threads or _default_threads()
    torch.set_num_threads(torch_threads)
    loaded = load_model(entry)
    attention_cost = _attention_cost(loaded)
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    cache, runner = _cache_and_runner(loaded, options)
    max_context = min(loaded.max_context, cache.num_pages * cache.page_size)
    prefixes = PrefixCache(cache) if options.prefix_cache else None
    scheduler = BatchScheduler(cache, prefixes, options.prefill_chunk, attention_cost)
    scheduler.step_overhead = _measure_overhead(runner, cache, min(options.prefill_chunk, max_context - 1))
    return Assembly(
        cache=cache,
        runner=runner,
        scheduler=scheduler,
        sampler=Sampler(vocabulary, options.max_batch_size, loaded.device),
        prompts=PromptBuilder(loaded.tokenizer, loaded.model.generation_config, vocabulary, max_context),
        max_context=max_context,
        torch_threads=torch_threads,
    )


def _default_threads() -> int:
    if torch.cuda.is_available():
        return torch.get_num_threads()
    # web, Redis and this process' other threads need a core: an engine on all of them waits for them at every barrier
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _cache_and_runner(loaded: LoadedModel, options: ChatEngineOptions) -> tuple[KVCache, ModelRunner]:
    joined = None
    if can_fuse(loaded.model):
        # before the cache takes what is free
        joined = join_weights(loaded.model)
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()
    if wants_flash(loaded):
        try:
            return _flash(loaded, joined, options)
        except EngineLoadError as error:
            log.warning("%s; the portable attention is used instead", error)
            torch.cuda.empty_cache()
    return _portable(loaded, joined, options)


def _portable(loaded: LoadedModel, joined: Joined, options: ChatEngineOptions) -> tuple[KVCache, ModelRunner]:
    cache = _make_cache(loaded, options, CPU_PAGE, token_major=False)
    attention = _paged_attention(cache)
    runner = PortableRunner(ModelForward(loaded.model), cache, attention)
    check = OutputCheck(loaded, cache)
    _hook_in(loaded, attention, runner, check)
    if not _fuse(loaded, joined, attention, runner, check):
        _pack(loaded, runner, check)
    return cache, runner


def _flash(loaded: LoadedModel, joined: Joined, options: ChatEngineOptions) -> tuple[KVCache, ModelRunner]:
    """The CUDA path, checked without and with graphs. Not run in this repository's tests: they have no GPU."""
    cache = _make_cache(loaded, options, GPU_PAGE, token_major=True)
    attention = FlashPagedAttention(cache)
    most = min(loaded.max_context, cache.num_pages * GPU_PAGE)
    runner = CudaRunner(ModelForward(loaded.model), cache, attention, most)
    check = OutputCheck(loaded, cache)
    _hook_in(loaded, attention, runner, check)
    _fuse(loaded, joined, attention, runner, check)
    if options.compile:
        try:
            runner.capture(options.max_batch_size)
            check(runner)
        except (EngineLoadError, RuntimeError) as error:
            log.warning("%s: decode runs without CUDA graphs: %s", loaded.name, error)
            runner.forget_graphs()
    return cache, runner


def _paged_attention(cache: KVCache) -> PagedAttention:
    plain = cache.pool.device.type == "cpu" and cache.pool.dtype == torch.float32
    if plain and torch.get_num_threads() <= COMPILED_ATTENTION_THREADS:
        # here, so that a GPU's worker doesn't import a compiler
        from workers.engines.chat.attention.cpu import CpuPagedAttention

        return CpuPagedAttention(cache)
    return PagedAttention(cache)


def _hook_in(loaded: LoadedModel, attention: ModelAttention, runner: ModelRunner, check: OutputCheck) -> None:
    """Let the model call `attention` in its layers, and refuse it if that changes its output."""
    loaded.model.set_attn_implementation(register(attention))
    check(runner)
    check.windows(attention)


def _fuse(
    loaded: LoadedModel, joined: Joined, attention: ModelAttention, runner: ModelRunner, check: OutputCheck
) -> bool:
    """Run the model in fewer operations where it is one of those, and gives the same."""
    if joined is None:
        return False
    plain = runner.model_forward
    try:
        runner.model_forward = FusedDecoder(loaded.model, joined, attention, loaded.max_context)
        check(runner)
    except (EngineLoadError, RuntimeError) as error:
        log.warning("transformers' own layers are used: with joint products, %s", error)
        runner.model_forward = plain
        return False
    if can_pack(joined[0].gate_up[0]):
        # the packed weights are a copy
        loaded.model.model.layers = torch.nn.ModuleList()
    return True


def _pack(loaded: LoadedModel, runner: ModelRunner, check: OutputCheck) -> None:
    """Prepare the linears of a model that runs through transformers' own code."""
    replaced = pack_linears(loaded.model)
    try:
        check(runner)
    except EngineLoadError as error:
        log.warning("weights stay in torch's layout: in oneDNN's, %s", error)
        for module, name, linear in replaced:
            setattr(module, name, linear)


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
