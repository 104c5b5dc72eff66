"""The GPU path's bookkeeping, with a plain function in the place of FlashAttention. No GPU is needed, none is tested."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.tiny_chat import CONFIGS
from workers.engines.chat.attention.base import register
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.model import cuda_graphs
from workers.engines.chat.model.cuda_graphs import CudaRunner, FlashPagedAttention
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.runner import Chunk, ModelForward


def plain_varlen(
    query,
    keys,
    values,
    query_starts,
    key_starts,
    longest_query,
    longest_key,
    *,
    scale,
    window_size,
    enable_gqa,
    **paged,
):
    """What torch.nn.attention.varlen.varlen_attn documents, one sequence after another."""
    assert query_starts.dtype == key_starts.dtype == paged["block_table"].dtype == torch.int32
    out = torch.empty_like(query)
    for number, count in enumerate(paged["seqused_k"].tolist()):
        start, end = int(query_starts[number]), int(query_starts[number + 1])
        assert end - start <= longest_query and count <= longest_key
        pages = paged["block_table"][number].long()
        own_keys, own_values = (pool[pages].flatten(0, 1)[:count].transpose(0, 1) for pool in (keys, values))
        at = torch.arange(count - (end - start), count)[:, None]
        seen = torch.arange(count)[None] <= at
        if window_size[0] >= 0:
            seen &= torch.arange(count)[None] >= at - window_size[0]
        own = query[start:end].transpose(0, 1)
        result = torch.nn.functional.scaled_dot_product_attention(
            own[None], own_keys[None], own_values[None], attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        out[start:end] = result[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_prefill_chunks_and_decode_rows_give_the_models_own_logits(family, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "varlen_attn", plain_varlen)
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config).eval()
    sequences = [torch.randint(0, 500, (length,)).tolist() for length in (45, 30, 9)]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in sequences]
    head_dim = getattr(config, "head_dim", None) or 16
    cache = KVCache(
        CacheShape(2, 2, head_dim, torch.float32, token_major=True), 20, 8, 4, torch.device("cpu")
    )
    attention = FlashPagedAttention(cache)
    model.set_attn_implementation(register(attention))
    runner = CudaRunner(ModelForward(model), cache, attention, max_context=64)
    slots = []
    for tokens in sequences:
        slots.append(cache.take_slot())
        cache.grow(slots[-1], len(tokens))
    # a hole is closed before anything is written
    cache.release(cache.take_slot())
    first = [Chunk(slot, 0, tokens[:20], False) for slot, tokens in zip(slots, sequences, strict=True)]
    runner.forward([first[0]._replace(tokens=sequences[0][:31]), first[1]])
    mixed = [
        Chunk(slots[2], 0, sequences[2][:-1], False),
        Chunk(slots[0], 31, sequences[0][31:-1], False),
        Chunk(slots[1], 20, sequences[1][20:-1], False),
    ]
    runner.forward(mixed)
    last = [
        Chunk(slot, len(tokens) - 1, tokens[-1:], True) for slot, tokens in zip(slots, sequences, strict=True)
    ]
    found = runner.forward(last)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    # rows that only fill a graph's shape change nothing
    with torch.inference_mode():
        padded = runner._run(runner._flash_plan(last, 8))
    torch.testing.assert_close(padded[:3], found, atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(padded).all())
    # the joint products give the same
    runner.model_forward = FusedDecoder(model, join_weights(model), attention, max_context=64)
    torch.testing.assert_close(runner.forward(last), found, atol=1e-4, rtol=1e-4)
    if family == "mistral":
        assert [call.window for call in attention.layers.values()] == [24, 24]
