"""The GPU's kernels without a GPU: interpreted, compiled for each kind of GPU, counted, and replaced."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import PTXASError

from tests.deployment import ROOT
from tests.engines.flash_model import FlashModel
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from tests.gpu_stand_ins.triton_launches import note_launches
from workers.engines.chat import backend
from workers.engines.chat.attention import flash
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.kernels import gpu
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.layers import (
    CompiledLayerOperations,
    LayerOperations,
    TritonLayerOperations,
    kinds_of_operations,
)
from workers.engines.chat.model.runner import ModelRunner


@pytest.mark.slow
def test_the_interpreted_kernels_give_what_transformers_give():
    """Triton reads the variable when it is imported, as torch and transformers may do at any time."""
    tests = ROOT / "tests" / "engines" / "gpu_kernels_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=340)
    assert ended.returncode == 0, ended.stdout[-4000:]


def launches_of(monkeypatch, dtype: torch.dtype, head_dim: int, norms: bool) -> list[Any]:
    """One launch of each kernel, with the shapes of a model of 8 billion parameters."""
    launches = note_launches(monkeypatch, gpu)
    x, weight, pages = torch.empty(3, 4096, dtype=dtype), torch.empty(4096, dtype=dtype), torch.arange(3)
    gpu.add_norm(x, x, weight, 1e-5)
    gpu.gate(torch.empty(3, 2 * 14336, dtype=dtype))
    joined, table = torch.empty(3, 48, head_dim, dtype=dtype), torch.empty(9, head_dim // 2, dtype=dtype)
    pool = torch.empty(4, 256, 8, head_dim, dtype=dtype)
    norm = (weight[:head_dim], 1e-6)
    gpu.rotate_and_store(
        joined, pages, (table, table), (pool, pool, pages, pages), (norm, norm) if norms else None
    )
    return launches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "norms"), [(torch.bfloat16, 128, False), (torch.float16, 80, True)]
)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_kernels_compile_for_each_kind_of_gpu(tmp_path, monkeypatch, capability, dtype, head_dim, norms):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(monkeypatch, dtype, head_dim, norms)
    assert len(launches) == 3
    for launch in launches:
        code = launch.compile(capability).asm
        assert f"sm_{capability}" in code["ptx"]
        assert code["cubin"].startswith(b"\x7fELF")


class CountedOperations(TorchDispatchMode):
    """Notes the operations that launch a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        view = func.is_view
        if view and isinstance(result, torch.Tensor):
            # `contiguous` is called a view, but may copy
            view = result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        if not view and "empty" not in name:
            self.names.append(name)
        return result


def operations_of_a_step(kind: type[LayerOperations], family: str, layers: int) -> list[str]:
    setup = FlashModel(family, layers)
    try:
        # through transformers' layers, which tell attention each layer's arguments
        setup.prefill()
        operations = kind(setup.model, setup.attention, max_context=64)
        weights = join_weights(setup.model)
        setup.runner.model_forward = FusedDecoder(setup.model, weights, setup.attention, operations)
        with CountedOperations() as counted:
            setup.runner.forward(setup.last_tokens())
        return counted.names
    finally:
        setup.attention.unregister()


@pytest.mark.parametrize(("family", "by_torch"), [("llama", 19), ("qwen3", 22)])
def test_a_layer_of_a_decode_step_is_nine_operations(monkeypatch, family, by_torch):
    monkeypatch.setattr(flash, "varlen_attn", FlashAttentionStandIn())
    one, two = (operations_of_a_step(LayerOperations, family, layers) for layers in (1, 2))
    assert len(two) - len(one) == by_torch
    launches = note_launches(monkeypatch, gpu)
    one = operations_of_a_step(TritonLayerOperations, family, 1)
    launched = len(launches)
    two = operations_of_a_step(TritonLayerOperations, family, 2)
    assert (launched, len(launches) - launched) == (4, 8)
    assert len(two) - len(one) + 4 == 9


def test_the_kernels_are_for_flash_attention_on_a_gpu(monkeypatch):
    setup = FlashModel("llama")
    setup.attention.unregister()
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    flash_attention, portable = setup.attention, PagedAttention(setup.cache)
    assert kinds_of_operations(on_gpu, flash_attention) == [TritonLayerOperations, LayerOperations]
    assert kinds_of_operations(on_gpu, portable) == [LayerOperations]
    assert kinds_of_operations(on_cpu, portable) == [CompiledLayerOperations]
    portable.dtype = torch.bfloat16
    assert kinds_of_operations(on_cpu, portable) == [LayerOperations]
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kinds_of_operations(on_gpu, flash_attention) == [LayerOperations]


class WrongOperations(LayerOperations):
    name = "Triton's kernels"

    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        return super().gate(joined) * 1.05


class UncompiledOperations(TritonLayerOperations):
    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        raise PTXASError("sm_999 is not known\nand what it was called with")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WrongOperations, "its attention is not the standard one"),
        (UncompiledOperations, "PTXASError: PTXAS error: sm_999 is not known"),
        # launched, but there is no GPU
        (TritonLayerOperations, "LlamaForCausalLM can't be served: "),
    ],
)
def test_torchs_operations_replace_kernels_that_fail(tmp_path, monkeypatch, caplog, kind, reason):
    monkeypatch.setattr(flash, "varlen_attn", FlashAttentionStandIn())
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [kind, LayerOperations])
    if kind is UncompiledOperations:
        note_launches(monkeypatch, gpu)
    engine, collector = make_engine(
        save_model(tmp_path, CONFIGS["llama"]()), kv_cache_tokens=4096, compile=False
    )
    try:
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert line.startswith("tiny: torch's operations are used instead of Triton's kernels: ")
        assert reason in line and "\n" not in line
        assert isinstance(engine.parts.runner, ModelRunner)
        assert isinstance(engine.parts.runner.model_forward, FusedDecoder)
        assert run(engine, collector, [chat_job("a", max_tokens=4)])[0].text()
    finally:
        engine.close()
