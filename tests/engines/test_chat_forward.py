"""The faster ways through a model give what the plain ones give, and are used only where they apply."""

import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config

from catalogue import ChatModelEntry
from tests.deployment import ROOT
from tests.engines.tiny_chat import CONFIGS, VOCABULARY, save_model
from workers.engines.chat import build
from workers.engines.chat.attention.base import LayerCall
from workers.engines.chat.attention.cpu import CpuPagedAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.build import EngineParts, build_engine
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.kernels.cpu import exp_of_differences, refine
from workers.engines.chat.kernels.cpu_layers import add_and_normalize, gate
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.model import linear, loader
from workers.engines.chat.model.fused_decoder import FusedDecoder
from workers.engines.chat.model.linear import PackedLinear, can_pack, linear_product
from workers.engines.chat.model.loader import LoadedModel, load_model
from workers.engines.chat.model.runner import Forward, ModelForward, ModelRunner
from workers.engines.chat.sequence import Chunk

LENGTHS = [1, 8, 9, 61, 24]


def decode_step(cache: KVCache, lengths: list[int], heads: int) -> tuple[list[Chunk], list[torch.Tensor]]:
    """Make one decode row for each length, fill the pages with random keys, and make a layer's tensors."""
    shape, chunks = cache.shape, []
    for length in lengths:
        slot = cache.take_slot()
        cache.grow(slot, length)
        chunks.append(Chunk(slot, length - 1, [0], True))
    cache.pool.normal_()
    sizes = (heads, shape.num_kv_heads, shape.num_kv_heads)
    # slices of one product, as FusedDecoder passes them
    joined = torch.randn(len(lengths), sum(sizes), shape.head_dim)
    return chunks, list(joined.split(sizes, 1))


def transpose_keys(pool: torch.Tensor) -> torch.Tensor:
    """The pool with keys as the compiled attention keeps them: [kv_heads, head_dim, page_size] in each
    page."""
    keys = pool[:, 0]
    return torch.stack([keys.transpose(-1, -2).reshape(keys.shape), pool[:, 1]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 8, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 8), (6, 1, 24), (14, 2, 40)])
def test_the_compiled_attention_gives_what_torchs_operations_give(
    heads, kv_heads, head_dim, window, softcap, dtype
):
    torch.manual_seed(1)
    shape = CacheShape(2, kv_heads, head_dim, torch.float32, token_major=False)
    plain = KVCache(shape, 20, 8, len(LENGTHS), torch.device("cpu"))
    chunks, (query, key, value) = decode_step(plain, LENGTHS, heads)
    # numbers that bfloat16 holds, so that both compute the same
    before = plain.pool.copy_(plain.pool.to(dtype)).clone()
    key, value = key.to(dtype).float(), value.to(dtype).float()
    own = KVCache(shape._replace(dtype=dtype), 20, 8, len(LENGTHS), torch.device("cpu"))
    own.pool.copy_(transpose_keys(before))
    own.tables[:] = plain.tables
    call = LayerCall(0.3, window, softcap)
    expected, compiled = (
        attend(attention, chunks, (query, key, value), call)
        for attention in (PagedAttention(plain), CpuPagedAttention(own))
    )
    torch.testing.assert_close(compiled, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(transpose_keys(plain.pool), own.pool.float())
    assert not torch.equal(plain.pool, before)


def attend(
    attention: PagedAttention, chunks: list[Chunk], tensors: Iterable[torch.Tensor], call: LayerCall
) -> torch.Tensor:
    """Attend in layer 0 with query, key and value."""
    attention.bind([torch.from_numpy(array) for array in attention.prepare(chunks)])
    query, key, value = tensors
    return attention.attend(0, query, key, value, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_attends_to_the_keys_that_the_compiled_loops_stored(dtype):
    torch.manual_seed(1)
    shape = CacheShape(2, 2, 16, torch.float32, token_major=False)
    caches = [
        KVCache(shape._replace(dtype=kind), 20, 8, 1, torch.device("cpu")) for kind in (torch.float32, dtype)
    ]
    attentions = [PagedAttention(caches[0]), CpuPagedAttention(caches[1])]
    for cache in caches:
        cache.grow(cache.take_slot(), 30)
    for start, end in ((0, 13), (13, 14), (14, 30)):
        tensors = tuple(torch.randn(end - start, heads, 16).to(dtype).float() for heads in (4, 2, 2))
        chunks = [Chunk(0, start, [0] * (end - start), True)]
        expected, compiled = (
            attend(each, chunks, tensors, LayerCall(0.3, None, None)) for each in attentions
        )
        torch.testing.assert_close(compiled, expected, atol=2e-6, rtol=1e-5)


def test_keys_are_rounded_to_bfloat16_as_torch_rounds():
    torch.manual_seed(1)
    cache = KVCache(CacheShape(1, 1, 1024, torch.bfloat16, token_major=False), 2, 8, 1, torch.device("cpu"))
    cache.grow(cache.take_slot(), 1)
    key = torch.randn(1, 1, 1024) * 10.0 ** torch.randint(-30, 30, (1, 1, 1024))
    # ties, whose bits end in half of the last place
    key[..., :512] = ((key[..., :512].view(torch.int32) & ~0xFFFF) | 0x8000).view(torch.float32)
    key[..., 512:515] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    key[..., 515:517] = torch.tensor([torch.inf, -torch.inf])
    value = key.flip(-1)
    attend(CpuPagedAttention(cache), [Chunk(0, 0, [0], True)], (key, key, value), LayerCall(1.0, None, None))
    page = int(cache.tables[0, 0])
    stored = cache.pool[0, 0, page].view(1024, 8)[:, 0], cache.pool[0, 1, page, 0, 0]
    for found, tensor in zip(stored, (key, value), strict=True):
        torch.testing.assert_close(found, tensor.view(-1).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_the_compiled_exponential_is_exact_to_rounding():
    differences = torch.cat([torch.linspace(-87, 0, 5000), torch.tensor([-torch.inf, -200.0, -0.0])])
    row = (differences + 3).numpy()
    exact = (torch.from_numpy(row.copy()).double() - 3).exp()
    total = exp_of_differences(row, len(row), np.float32(1))
    error = (torch.from_numpy(row).double() - exact).abs() / exact.clamp(min=1e-37)
    # the argument's own rounding grows with it: e^-60 may be off by a few millionths
    assert (error[:-3] / (1 - differences[:-3].double())).max() < 2e-7
    assert row[-3] == row[-2] == 0
    assert float(total) == pytest.approx(float(exact.sum()), rel=1e-6)


def built(weights, **options) -> EngineParts:
    engine = {"torch_threads": 1, "max_batch_size": 4, **options}
    entry = {"name": "tiny", "tasks": ["chat"], "weights": str(weights), "engine": engine}
    return build_engine(ChatModelEntry.model_validate(entry), 1.0, Metrics(), lambda request_id: None)


def forward_of(parts: EngineParts) -> Forward:
    assert isinstance(parts.runner, ModelRunner)
    return parts.runner.model_forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_shaped_models_run_fused_and_keep_no_second_copy_of_their_weights(
    tmp_path, family, dtype, caplog, monkeypatch
):
    storages: list[weakref.ref[Any]] = []

    def remember(entry: ChatModelEntry) -> LoadedModel:
        model = load_model(entry)
        # the numbers themselves: a tensor of its own may share them
        storages.append(weakref.ref(model.model.model.layers[0].mlp.down_proj.weight.untyped_storage()))
        return model

    monkeypatch.setattr(build, "load_model", remember)
    parts = built(save_model(tmp_path, CONFIGS[family]()), dtype=dtype)
    gc.collect()
    # oneDNN has bfloat16 on processors with AVX-512 only
    packed = can_pack(torch.ones(1, 1, dtype=getattr(torch, dtype)))
    assert (storages[0]() is None) == packed
    assert packed or dtype == "bfloat16"
    assert isinstance(forward_of(parts), FusedDecoder)
    assert isinstance(parts.attention, CpuPagedAttention)
    assert not caplog.records


def test_biases_are_joined_too(tmp_path):
    torch.manual_seed(3)
    config = CONFIGS["llama"]()
    config.attention_bias = config.mlp_bias = True
    parts = built(save_model(tmp_path, config))
    assert isinstance(forward_of(parts), FusedDecoder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mixtral"])
def test_other_models_run_through_transformers_with_packed_products(tmp_path, family, dtype, caplog):
    parts = built(save_model(tmp_path, CONFIGS[family]()), dtype=dtype)
    forward = forward_of(parts)
    assert isinstance(forward, ModelForward)
    packed = can_pack(torch.ones(1, 1, dtype=getattr(torch, dtype)))
    assert any(isinstance(module, PackedLinear) for module in forward._model.modules()) == packed
    assert isinstance(parts.attention, CpuPagedAttention)
    assert not caplog.records


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_weights_take_and_return_float32(dtype, packed, monkeypatch):
    if not packed:
        monkeypatch.setattr(linear, "can_pack", lambda weight: False)
    torch.manual_seed(4)
    weight, bias = torch.randn(48, 96).to(dtype), torch.randn(48).to(dtype)
    x = torch.randn(5, 96)
    found = linear_product(weight, bias)(x)
    exact = F.linear(x.to(dtype).double(), weight.double(), bias.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.to(dtype).float(), atol=0.01, rtol=torch.finfo(dtype).eps)


def test_many_threads_keep_torchs_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "COMPILED_ATTENTION_THREADS", 0)
    parts = built(save_model(tmp_path, CONFIGS["llama"]()))
    assert type(parts.attention) is PagedAttention


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_cpu_is_that_of_weights_and_cache_alone(tmp_path, dtype):
    parts = built(save_model(tmp_path, CONFIGS["llama"]()), dtype=dtype)
    forward = forward_of(parts)
    assert isinstance(forward, FusedDecoder)
    assert forward._embedding.dtype == parts.precision.dtype == getattr(torch, dtype)
    # no loop converts float16
    assert parts.cache.pool.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert type(parts.attention) is CpuPagedAttention


def test_a_fused_pass_that_differs_is_not_used(tmp_path, monkeypatch, caplog):
    right = FusedDecoder.__call__
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *args: right(*args) * 1.05)
    parts = built(save_model(tmp_path, CONFIGS["llama"]()))
    assert isinstance(forward_of(parts), ModelForward)
    assert "transformers' own layers are used" in caplog.text


def test_packed_products_that_differ_are_not_used(tmp_path, monkeypatch, caplog):
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda *args: right(*args) * 1.05)
    parts = built(save_model(tmp_path, CONFIGS["gemma2"]()))
    forward = forward_of(parts)
    assert isinstance(forward, ModelForward)
    assert not any(isinstance(module, PackedLinear) for module in forward._model.modules())
    assert "weights stay in torch's layout" in caplog.text


def test_a_relative_of_llama_with_another_activation_is_not_fused(tmp_path):
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="gelu",
    )
    parts = built(save_model(tmp_path, config))
    assert isinstance(forward_of(parts), ModelForward)


@pytest.mark.slow
def test_a_worker_on_a_gpu_imports_no_compiler():
    program = "import sys, workers.engines.chat.build; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=340).returncode == 0


def as_numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_addition_and_norm_give_what_torch_gives(dtype):
    torch.manual_seed(1)
    x, added, weight = torch.randn(7, 90), torch.randn(7, 90).to(dtype), torch.randn(90)
    total, out = torch.empty(7, 90), torch.empty(7, 90, dtype=dtype)
    add_and_normalize(x.numpy(), as_numbers(added), weight.numpy(), 1e-5, total.numpy(), as_numbers(out))
    assert torch.equal(total, x + added)
    expected = F.rms_norm(total, weight.shape, weight, 1e-5)
    # rounded from sums that were added in another order: at most the last bit differs
    rtol, equal = (2**-7, 0.98) if dtype == torch.bfloat16 else (1e-5, 0.0)
    torch.testing.assert_close(out, expected.to(dtype), rtol=rtol, atol=1e-6)
    assert (out == expected.to(dtype)).float().mean() >= equal


def test_the_compiled_gate_is_torchs_rounded_once():
    torch.manual_seed(1)
    joined = (torch.randn(9, 2 * 150) * 8).bfloat16()
    joined[0, :6] = torch.tensor([-200.0, 200.0, 0.0, -0.0, math.inf, math.nan])
    # both products lie in the middle between two numbers of bfloat16
    joined[1, :2], joined[1, 150:152] = 96, torch.tensor([1 + 2**-7, 1 + 3 * 2**-7])
    out = torch.empty(9, 150, dtype=torch.bfloat16)
    gate(as_numbers(joined), as_numbers(out))
    one, other = joined.float().chunk(2, -1)
    exact = F.silu(one) * other
    torch.testing.assert_close(out, exact.bfloat16(), rtol=2**-7, atol=1e-30, equal_nan=True)
    assert (out == exact.bfloat16()).float().mean() > 0.98
    assert out[1, :2].tolist() == [64 * (1.5 + 2 * 2**-7), 64 * (1.5 + 4 * 2**-7)]


def test_the_greatest_logits_are_those_of_float32():
    torch.manual_seed(1)
    weight, x = torch.randn(1000, 64).bfloat16(), torch.randn(5, 64) * 8
    # near the greatest of the first row: rounded, they are all equal
    weight[100:110] = weight[:1].float().mul(1 + torch.arange(10)[:, None] / 1000).bfloat16()
    x[0] = weight[0].float() * 3
    exact = x @ weight.float().T
    rounded = exact.bfloat16().float()
    refined = rounded.clone()
    refine(refined.numpy(), x.numpy(), as_numbers(weight))
    greatest = exact.amax(1, keepdim=True)
    near = exact >= greatest - greatest.abs() * 2**-8
    torch.testing.assert_close(refined[near], exact[near], rtol=1e-5, atol=1e-5)
    assert torch.equal(refined.argmax(1), exact.argmax(1))
    far = exact < greatest - greatest.abs() * 2**-6
    assert torch.equal(refined[far], rounded[far])
    assert not torch.equal(rounded.argmax(1), exact.argmax(1))
