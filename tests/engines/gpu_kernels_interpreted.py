"""The GPU's kernels in Triton's interpreter. test_chat_gpu_kernels.py runs this file in a process of its
own."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.engines.flash_model import FlashModel
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from tests.gpu_stand_ins.triton_interpreter import round_as_a_gpu
from workers.engines.chat.attention import flash
from workers.engines.chat.kernels import gpu
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.layers import TritonLayerOperations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    round_as_a_gpu(monkeypatch)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums: rarely one unit in the last place apart, float32 a few."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == torch.float32:
        return torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    # as integers, numbers of one sign are ordered like their bits
    bits = [
        torch.where(ints < 0, -32768 - ints, ints)
        for ints in (tensor.view(torch.int16).int() for tensor in (found, expected))
    ]
    apart = (bits[0] - bits[1]).abs()
    assert int(apart.max()) <= 1
    # a number that isn't rounded where transformers round it changes every third result
    assert int(apart.sum()) <= 1 + found.numel() // 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 80), (64, 576), (1, 4096), (3, 5120)])
def test_add_norm_gives_what_transformers_give(dtype, tokens, width):
    x, added = (torch.randn(tokens, width).mul(5).to(dtype) for _ in range(2))
    x[-1] *= 50
    norm = LlamaRMSNorm(width, 1e-5).to(dtype)
    norm.weight.data.uniform_(-2, 2)
    total, normed = gpu.add_norm(x, added, norm.weight, 1e-5)
    assert torch.equal(total, x + added)
    assert_close(normed, norm(x + added))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 4, 2, 64), (3, 3, 3, 80), (3, 6, 1, 96), (64, 2, 1, 128), (3, 5, 5, 128), (1, 4, 1, 256)],
)
def test_rotate_and_store_gives_what_transformers_give(dtype, tokens, heads, kv_heads, head_dim, normed):
    joined = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    positions = torch.randint(0, 100, (tokens,))
    angles = torch.rand(100, head_dim // 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages, page_size = 7, 16
    pool = torch.randn(2, pages, page_size, kv_heads, head_dim).to(dtype)
    places = torch.randperm(pages * page_size)[:tokens]
    destination = (pool[0], pool[1], places // page_size, places % page_size)

    query, key, value = joined.clone().split((heads, kv_heads, kv_heads), 1)
    norms = None
    if normed:
        query_norm, key_norm = (LlamaRMSNorm(head_dim, eps).to(dtype) for eps in (1e-6, 1e-2))
        for norm in (query_norm, key_norm):
            norm.weight.data.uniform_(0.5, 1.5)
        query, key = query_norm(query), key_norm(key)
        norms = ((query_norm.weight, 1e-6), (key_norm.weight, 1e-2))
    whole = [table[positions].repeat(1, 2) for table in (cos, sin)]
    query, key = apply_rotary_pos_emb(query, key, *whole)
    expected = pool.clone().view(2, pages * page_size, kv_heads, head_dim)
    expected[0, places], expected[1, places] = key, value

    found = gpu.rotate_and_store(joined, positions, (cos, sin), destination, norms)
    if normed:
        # a product may be rounded the other way, which a rotation enlarges: compare to the numbers' size
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, query, rtol=step, atol=4 * step)
        torch.testing.assert_close(pool, expected.view_as(pool), rtol=step, atol=4 * step)
    else:
        assert_close(found, query)
        assert_close(pool, expected.view_as(pool))
    untouched = torch.ones(pages * page_size, dtype=torch.bool)
    untouched[places] = False
    assert torch.equal(pool.view_as(expected)[:, untouched], expected[:, untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 80), (64, 128), (3, 3000)])
def test_the_gate_gives_what_transformers_give(dtype, tokens, width):
    joined = torch.randn(tokens, 2 * width).mul(4).to(dtype)
    halves = joined.chunk(2, -1)
    assert_close(gpu.gate(joined), F.silu(halves[0]) * halves[1])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_through_the_kernels_gives_its_own_logits(family, monkeypatch):
    monkeypatch.setattr(flash, "varlen_attn", FlashAttentionStandIn())
    setup = FlashModel(family)
    try:
        # once through transformers' layers, which tell attention each layer's arguments
        setup.runner.forward([setup.chunk(2, 0, 8)])
        operations = TritonLayerOperations(setup.model, setup.attention, max_context=64)
        weights = join_weights(setup.model)
        setup.runner.model_forward = FusedDecoder(setup.model, weights, setup.attention, operations)
        setup.prefill()
        found = setup.runner.forward(setup.last_tokens())
        torch.testing.assert_close(found, setup.expected, atol=1e-4, rtol=1e-4)
    finally:
        setup.attention.unregister()
