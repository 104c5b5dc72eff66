"""Composes a loaded model, its KV cache and everything around them into a warmed-up engine.

Each faster way of computing the model is compared with the model's own output (model/output_check.py) and
used only if the two agree.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from catalogue import ChatEngineOptions, ChatModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.cache.prefix_cache import PrefixCache
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.model.cuda_graphs import CudaGraphs
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
from workers.engines.chat.model.runner import ModelForward, ModelRunner, Runner
from workers.engines.chat.outputs import RequestOutputs
from workers.engines.chat.prompt import PromptBuilder
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.scheduler import BatchScheduler
from workers.engines.chat.sequence import Chunk
from workers.engines.failures import free_memory

log = logging.getLogger(__name__)

COMPILED_ATTENTION_THREADS = 4
"""The compiled attention runs in one thread.

For 64 rows it takes 0.4 of the time of torch's operations in one or two threads; with more threads than this,
torch's operations are faster.
"""


class Backend(NamedTuple):
    """What computes the model's forward passes."""

    cache: KVCache
    attention: ModelAttention
    runner: Runner


@dataclass(slots=True)
class EngineParts:
    """The engine's collaborators."""

    cache: KVCache
    attention: ModelAttention
    runner: Runner
    scheduler: BatchScheduler
    sampler: Sampler
    prompts: PromptBuilder
    outputs: RequestOutputs
    max_context: int
    torch_threads: int

    @property
    def kv_cache_tokens(self) -> int:
        """The number of tokens that the KV cache holds."""
        return self.cache.num_pages * self.cache.page_size

    def describe(self) -> str:
        """One line for the log: device, dtype, attention, CUDA graphs, sizes."""
        device, dtype = self.cache.pool.device, str(self.cache.pool.dtype).removeprefix("torch.")
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        graphs = "CUDA graphs" if isinstance(self.runner, CudaGraphs) else "no CUDA graphs"
        return (
            f"{where}, {dtype}, attention by {self.attention.name}, {graphs},"
            f" KV cache of {self.kv_cache_tokens} tokens, context of {self.max_context} tokens"
        )

    def free(self) -> None:
        """Return the memory of weights and cache. The parts can't be used afterwards."""
        self.attention.unregister()
        del self.attention, self.runner, self.cache.pool
        free_memory()


def build_engine(entry: ChatModelEntry, metrics: Metrics, on_end: Callable[[str], None]) -> EngineParts:
    """Load the model and warm it up. Raises EngineLoadError.

    `on_end` is called with the id of each request that has ended.
    """
    options = entry.engine
    torch_threads = options.torch_threads or _default_threads()
    torch.set_num_threads(torch_threads)
    loaded = load_model(entry)
    # before the weights are packed: some of the model's parameters are then gone
    attention_cost = _attention_cost(loaded)
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    backend = _build_backend(loaded, options)
    cache = backend.cache
    max_context = min(loaded.max_context, cache.num_pages * cache.page_size)
    prefixes = PrefixCache(cache) if options.prefix_cache else None
    scheduler = BatchScheduler(cache, prefixes, options.prefill_chunk, attention_cost)
    scheduler.step_overhead = _measure_overhead(backend, min(options.prefill_chunk, max_context - 1))
    prompts = PromptBuilder(loaded.tokenizer, loaded.model.generation_config, vocabulary, max_context)
    return EngineParts(
        cache=cache,
        attention=backend.attention,
        runner=backend.runner,
        scheduler=scheduler,
        sampler=Sampler(vocabulary, options.max_batch_size, loaded.device),
        prompts=prompts,
        outputs=RequestOutputs(scheduler, prompts.vocabulary, metrics, on_end),
        max_context=max_context,
        torch_threads=torch_threads,
    )


def _default_threads() -> int:
    if torch.cuda.is_available():
        return torch.get_num_threads()
    # web, Redis and this process' other threads need a core: an engine on all cores waits for them at every
    # barrier
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _build_backend(loaded: LoadedModel, options: ChatEngineOptions) -> Backend:
    joined = None
    if can_fuse(loaded.model):
        # before the cache takes the free memory: joining allocates new weights
        joined = join_weights(loaded.model)
        free_memory()
    if wants_flash(loaded):
        try:
            return _build_flash(loaded, joined, options)
        except EngineLoadError as error:
            log.warning("%s; the portable attention is used instead", error)
            free_memory()
    return _build_portable(loaded, joined, options)


def _build_portable(
    loaded: LoadedModel, joined: list[JoinedWeights] | None, options: ChatEngineOptions
) -> Backend:
    """The backend for any device."""
    cache = _make_cache(loaded, options, CPU_PAGE, token_major=False)
    attention = _paged_attention(cache)
    check = OutputCheck(loaded, cache)
    runner = _checked_runner(loaded, attention, check)
    if joined is None or not _fuse(loaded, joined, attention, runner, check):
        _pack(loaded, runner, check)
    return Backend(cache, attention, runner)


def _build_flash(
    loaded: LoadedModel, joined: list[JoinedWeights] | None, options: ChatEngineOptions
) -> Backend:
    """The backend for a GPU. Not run in this repository's tests, which have none."""
    cache = _make_cache(loaded, options, GPU_PAGE, token_major=True)
    attention = FlashPagedAttention(cache, min(loaded.max_context, cache.num_pages * GPU_PAGE))
    check = OutputCheck(loaded, cache)
    runner = _checked_runner(loaded, attention, check)
    if joined is not None:
        _fuse(loaded, joined, attention, runner, check)
    if options.compile:
        graphs = CudaGraphs(runner, attention, cache.padding_slot)
        try:
            graphs.capture(options.max_batch_size)
            check(graphs)
            return Backend(cache, attention, graphs)
        except (EngineLoadError, RuntimeError) as error:
            log.warning("%s: decode runs without CUDA graphs: %s", loaded.name, error)
    return Backend(cache, attention, runner)


def _paged_attention(cache: KVCache) -> PagedAttention:
    float_on_cpu = cache.pool.device.type == "cpu" and cache.pool.dtype == torch.float32
    if float_on_cpu and torch.get_num_threads() <= COMPILED_ATTENTION_THREADS:
        # imported here, so that a worker on a GPU doesn't load a compiler
        from workers.engines.chat.attention.cpu import CpuPagedAttention

        return CpuPagedAttention(cache)
    return PagedAttention(cache)


def _checked_runner(loaded: LoadedModel, attention: ModelAttention, check: OutputCheck) -> ModelRunner:
    """Let the model's layers call `attention`. Raises EngineLoadError if that changes the model's output."""
    runner = ModelRunner(ModelForward(loaded.model), attention, loaded.device)
    loaded.model.set_attn_implementation(attention.register())
    check(runner)
    check.windows(attention)
    return runner


def _fuse(
    loaded: LoadedModel,
    joined: list[JoinedWeights],
    attention: ModelAttention,
    runner: ModelRunner,
    check: OutputCheck,
) -> bool:
    """Let the runner use FusedDecoder.

    Returns False and leaves the runner unchanged if that changes the output.
    """
    plain = runner.model_forward
    try:
        runner.model_forward = FusedDecoder(loaded.model, joined, attention, loaded.max_context)
        check(runner)
    except (EngineLoadError, RuntimeError) as error:
        log.warning("transformers' own layers are used: with joined weights, %s", error)
        runner.model_forward = plain
        return False
    if can_pack(joined[0].gate_up[0]):
        # FusedDecoder holds packed copies of these weights
        loaded.model.model.layers = torch.nn.ModuleList()
    return True


def _pack(loaded: LoadedModel, runner: ModelRunner, check: OutputCheck) -> None:
    """Pack the linears of a model that runs through transformers' layers, unless that changes the output."""
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
    """The cost of attending to one key, relative to the cost of a token's pass through all weights.

    Counted in arithmetic operations and doubled: attention's small products run at half the speed of the
    large ones.
    """
    text = loaded.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_one_key = 4 * text.num_hidden_layers * text.num_attention_heads * head_dim
    of_weights = 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    return 2 * of_one_key / of_weights


def _measure_overhead(backend: Backend, chunk: int) -> float:
    """Measure the fixed cost of a forward pass, in tokens, from passes over one and over `chunk` tokens."""
    cache = backend.cache

    def seconds(tokens: int) -> float:
        slot = cache.take_slot()
        try:
            cache.grow(slot, tokens)
            times = []
            for _ in range(3):
                started = time.perf_counter()
                backend.runner.forward([Chunk(slot, 0, [0] * tokens, True)]).sum().item()
                times.append(time.perf_counter() - started)
        finally:
            cache.release(slot)
        return min(times)

    one, many = seconds(1), seconds(chunk)
    each = max((many - one) / max(1, chunk - 1), 1e-9)
    return min(max(0.0, one / each - 1), 4096.0)
