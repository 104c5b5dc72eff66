"""The memory that is kept free for steps is enough for a model of 8 billion parameters, as fake tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from catalogue import ChatEngineOptions
from tests.gpu_stand_ins.fake_memory import GPU, FakeGpuMemory
from workers.engines.chat.attention import flash
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.memory import _sampled_in_every_way, step_bytes
from workers.engines.chat.model.fused_decoder import FusedDecoder, JoinedWeights, join_weights
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.model.loader import GPU_PAGE, LoadedModel, cache_shape
from workers.engines.chat.model.precision import Precision
from workers.engines.chat.model.runner import ModelForward, ModelRunner
from workers.engines.chat.model.uploads import DTYPES, Uploads
from workers.engines.chat.sampling import sampler
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.sequence import Chunk

CHUNK = 2048
BLOCK_TABLES = 2**20
"""Bytes. They are wider than in the steps that are measured: 4 bytes for each page of each row."""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpuMemory]:
    """Fake tensors, and shapes instead of what needs values."""

    def varlen_attn(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        # the kernel also returns the logarithm of each row's sum
        torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        return torch.empty_like(query)

    def tensors(uploads: Uploads, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        return [torch.empty(array.shape, dtype=DTYPES[array.dtype], device=GPU) for array in arrays]

    def to_host(tensors: list[torch.Tensor]) -> list[Any]:
        torch.cat([tensor.double().flatten() for tensor in tensors])
        return [np.zeros(tensor.shape).tolist() for tensor in tensors]

    monkeypatch.setattr(flash, "varlen_attn", varlen_attn)
    monkeypatch.setattr(Uploads, "tensors", tensors)
    monkeypatch.setattr(sampler, "to_host", to_host)
    with FakeGpuMemory() as made:
        yield made


def llama_8b(max_context: int) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=max_context,
    )
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(model, None, config, max_context, GPU, "llama", Precision(torch.bfloat16))


def reserve(loaded: LoadedModel, joined: list[JoinedWeights], options: ChatEngineOptions) -> int:
    pages = CHUNK // GPU_PAGE + 2
    trial = KVCache(cache_shape(loaded, True), pages, GPU_PAGE, options.max_batch_size, GPU)
    attention = FlashPagedAttention(trial, pages * GPU_PAGE)
    return step_bytes(loaded, joined, attention, trial, options, CHUNK)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "max_context"), [(1, 8192), (64, 8192), (64, 131_072), (256, 8192)])
def test_steps_need_no_more_than_was_kept_free(memory: FakeGpuMemory, rows: int, max_context: int) -> None:
    loaded = llama_8b(max_context)
    weights = memory.allocated
    joined = join_weights(loaded.model)
    assert memory.allocated == weights > 14 * 2**30
    options = ChatEngineOptions(max_batch_size=rows, compile=False)
    kept_free = reserve(loaded, joined, options)
    assert memory.allocated == weights

    cache = KVCache(cache_shape(loaded, True), 100, GPU_PAGE, rows, GPU)
    attention = FlashPagedAttention(cache, max_context)
    before = memory.allocated

    def assert_fits(run: Callable[[], Any]) -> Any:
        memory.reset_peak()
        result = run()
        assert memory.peak - before <= kept_free + BLOCK_TABLES
        return result

    runner = ModelRunner(ModelForward(loaded.model), attention, GPU)
    loaded.model.set_attn_implementation(attention.register())
    slots = [cache.take_slot() for _ in range(rows)]
    cache.grow(slots[0], 2 * CHUNK)
    for slot in slots[1:]:
        cache.share(slot, cache.pages_of(slots[0])[:1])
    decode = [Chunk(slot, 8, [0], True) for slot in slots]
    sampled = [_sampled_in_every_way(at) for at in range(rows)]

    def steps() -> None:
        own = Sampler(loaded.text_config.vocab_size, rows, GPU)
        for _ in range(2):
            assert_fits(lambda: own.sample(runner.forward(decode), sampled))
            assert_fits(lambda: runner.forward([Chunk(slots[0], CHUNK, [0] * CHUNK, True)]))
            assert_fits(lambda: runner.forward([*decode[1:], Chunk(slots[0], CHUNK, [0] * CHUNK, True)]))

    try:
        steps()
        operations = assert_fits(lambda: LayerOperations(loaded.model, attention, max_context))
        runner.model_forward = FusedDecoder(loaded.model, joined, attention, operations)
        steps()
    finally:
        attention.unregister()
