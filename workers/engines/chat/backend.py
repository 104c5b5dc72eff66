"""Chooses how the model is computed: attention, cache, layers, CUDA graphs.

Each faster way is compared with the model's own output (model/output_check.py) and used only if the two
agree.
"""

import logging
from typing import NamedTuple

import torch

from catalogue import TextEngineOptions
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.memory import CacheFactory
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.fused_decoder import FusedDecoder, JoinedWeights, can_fuse, join_weights
from workers.engines.chat.model.layers import kinds_of_operations
from workers.engines.chat.model.linear import can_pack, pack_linears
from workers.engines.chat.model.loader import (
    CPU_PAGE,
    GPU_PAGE,
    LoadedModel,
    first_line,
    uses_compiled_attention,
    wants_flash,
)
from workers.engines.chat.model.output_check import OutputCheck
from workers.engines.chat.model.runner import ModelForward, ModelRunner, Runner
from workers.engines.chat.model.split_runner import SplitRunner
from workers.engines.failures import free_memory

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """What computes the model's forward passes."""

    cache: KVCache
    attention: ModelAttention
    runner: Runner


def build_backend(
    loaded: LoadedModel, options: TextEngineOptions, *, prefill_chunk: int, gpu_share: float, halves: bool
) -> Backend:
    """Build the fastest backend whose output is right. Raises EngineLoadError if there is none.

    `prefill_chunk`: the largest number of prompt tokens in a step. `gpu_share`: the part of the GPU's memory
    that this process may use. `halves`: two threads may compute the halves of a step on a CPU.
    """
    joined = None
    if can_fuse(loaded.model):
        # before the cache takes the free memory: joining allocates new weights
        joined = join_weights(loaded.model)
        free_memory()
    caches = CacheFactory(loaded, joined, options, prefill_chunk, gpu_share)
    backend = _try_flash(loaded, joined, options, caches) if wants_flash(loaded) else None
    if backend is None:
        free_memory()
        backend = _build_portable(loaded, joined, caches, halves)
    return backend


def _build_portable(
    loaded: LoadedModel, joined: list[JoinedWeights] | None, caches: CacheFactory, halves: bool
) -> Backend:
    """The backend for any device."""
    cache = caches.make(CPU_PAGE, _paged_attention, token_major=False)
    attention = _paged_attention(cache)
    check = OutputCheck(loaded, cache)
    runner = _checked_runner(loaded, attention, check)
    if joined is None or not _fuse(loaded, joined, attention, runner, check):
        _pack(loaded, runner, check)
    elif halves and loaded.device.type == "cpu" and loaded.vision is None:
        return Backend(cache, attention, _split(loaded, runner, _paged_attention(cache), check))
    return Backend(cache, attention, runner)


def _split(loaded: LoadedModel, runner: ModelRunner, attention: ModelAttention, check: OutputCheck) -> Runner:
    """Let a second thread compute half of each step with FusedDecoder and an `attention` of its own."""
    decoder = runner.model_forward
    assert isinstance(decoder, FusedDecoder)
    other = ModelRunner(decoder.with_attention(attention), attention, loaded.device)
    split = SplitRunner(runner, other, decoder.head.room)
    try:
        check(split)
    except EngineLoadError as error:
        log.warning("steps are not computed in halves: %s", error)
        split.close()
        return runner
    return split


def _try_flash(
    loaded: LoadedModel,
    joined: list[JoinedWeights] | None,
    options: TextEngineOptions,
    caches: CacheFactory,
) -> Backend | None:
    """The backend for a GPU.

    Returns None, without holding its cache any longer, if its output is not right.
    """

    def attention_over(cache: KVCache) -> FlashPagedAttention:
        return FlashPagedAttention(cache, min(loaded.max_context, cache.num_pages * GPU_PAGE))

    attention = None
    try:
        cache = caches.make(GPU_PAGE, attention_over, token_major=True)
        attention = attention_over(cache)
        check = OutputCheck(loaded, cache)
        runner = _checked_runner(loaded, attention, check)
    except TemporaryLoadError:
        raise
    except EngineLoadError as error:
        log.warning("%s; the portable attention is used instead", str(error))
        # transformers' table of attentions would keep the cache, nine tenths of the free memory
        if attention is not None:
            attention.unregister()
        return None
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
    if uses_compiled_attention(cache.pool.device, cache.shape.head_dim):
        # imported here, so that a worker on a GPU doesn't load a compiler
        from workers.engines.chat.attention.cpu import CpuPagedAttention

        return CpuPagedAttention(cache)
    return PagedAttention(cache)


def _checked_runner(loaded: LoadedModel, attention: ModelAttention, check: OutputCheck) -> ModelRunner:
    """Let the model's layers call `attention`. Raises EngineLoadError if that changes the model's output."""
    runner = ModelRunner(
        ModelForward(loaded.model),
        attention,
        loaded.device,
        None if loaded.vision is None else loaded.vision.encoder,
    )
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
    """Let the runner use FusedDecoder, with the fastest operations that give the model's own output.

    Returns False and leaves the runner unchanged if there are none.
    """
    plain, model = runner.model_forward, loaded.model
    kinds = kinds_of_operations(loaded.device, attention)
    others = [*(kind.name for kind in kinds[1:]), "transformers' own layers"]
    for kind, other in zip(kinds, others, strict=True):
        try:
            operations = kind(model, attention, loaded.max_context)
            runner.model_forward = FusedDecoder(model, joined, attention, operations)
            check(runner)
        # any error: Triton needs a C compiler and a cache that it can write, and must know the GPU
        except Exception as error:
            reason = first_line(error)
            if not isinstance(error, EngineLoadError):
                reason = f"{type(error).__name__}: {reason}"
            log.warning("%s: %s are used instead of %s: %s", loaded.name, other, kind.name, reason)
            runner.model_forward = plain
            continue
        if can_pack(joined[0].gate_up[0]):
            # FusedDecoder holds packed copies of these weights
            model.model.layers = torch.nn.ModuleList()
        return True
    return False


def _pack(loaded: LoadedModel, runner: ModelRunner, check: OutputCheck) -> None:
    """Pack the linears of a model that runs through transformers' layers, unless that changes the output."""
    replaced = pack_linears(loaded.model)
    try:
        check(runner)
    except EngineLoadError as error:
        log.warning("weights stay in torch's layout: in oneDNN's, %s", error)
        for module, name, linear in replaced:
            setattr(module, name, linear)
