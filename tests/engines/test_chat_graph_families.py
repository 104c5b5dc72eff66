"""Decode steps of each family as CUDA graphs, on a stand-in for a GPU.

A recording must not read a value on the host, and nothing from the host's memory: a replay would not do it
again, or read what is there by then.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Olmo2Config, Phi3Config

from tests.engines.flash_model import FlashModel
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from tests.gpu_stand_ins import StandInGpu
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from tests.gpu_stand_ins.graphs import RecordedOperations, recorded
from workers.engines.chat import backend
from workers.engines.chat.attention import flash
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.fused_decoder import FusedDecoder, can_fuse, join_weights
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.model.runner import ModelForward, ModelRunner

GPU = torch.device("cuda", 0)
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def longrope() -> Phi3Config:
    """Phi 3 whose angles depend on whether the longest position is beyond 512."""
    config: Phi3Config = CONFIGS["phi3"]()
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, **FACTORS}
    config.rope_parameters = rope | {"original_max_position_embeddings": 512}
    return config


def dynamic() -> Olmo2Config:
    """OLMo 2 whose angles depend on the longest position so far, which the host reads in each step."""
    config: Olmo2Config = CONFIGS["olmo2"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGpu]:
    use_stand_ins(monkeypatch)
    with StandInGpu() as made:
        yield made


def use_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "varlen_attn", FlashAttentionStandIn())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedOperations)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [LayerOperations])


def assert_captured(found: FlashModel) -> None:
    graphs = CudaGraphs(found.runner, found.attention, found.cache.padding_slot)
    graphs.capture(max_batch=4)
    last = found.last_tokens()
    for rows in (slice(0, 3), slice(1, 3), slice(2, 3), slice(0, 3)):
        logits = graphs.forward(last[rows]).cpu()
        torch.testing.assert_close(logits, found.expected[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "phi3 with longrope", "olmo2"]
)
@torch.inference_mode()
def test_a_replay_gives_the_models_own_logits(gpu: StandInGpu, family: str) -> None:
    model = FlashModel(family, config=longrope() if "longrope" in family else None, device=GPU)
    try:
        model.prefill()
        cost = gpu.measure(lambda: model.runner.forward(model.last_tokens()))
        assert cost.waits == []
        assert_captured(model)
        if can_fuse(model.model):
            operations = LayerOperations(model.model, model.attention, max_context=64)
            joined = join_weights(model.model)
            model.runner.model_forward = FusedDecoder(model.model, joined, model.attention, operations)
            assert_captured(model)
    finally:
        model.attention.unregister()


@pytest.mark.parametrize("reads", ["a value", "the host's memory", "pinned memory"])
@torch.inference_mode()
def test_a_model_that_reads_on_the_host_can_not_be_recorded(gpu: StandInGpu, reads: str) -> None:
    model = FlashModel("llama", device=GPU)
    forward = ModelForward(model.model)

    def reading(
        ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: torch.Tensor | None,
        images: Any = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if reads == "a value":
            assert positions.max() < 1024
        elif reads == "the host's memory":
            ids = ids + torch.tensor([0], device=GPU)
        else:
            ids = ids + torch.zeros(1, dtype=torch.int64).pin_memory().to(GPU, non_blocking=True)
        return forward(ids, positions, outputs)

    model.runner.model_forward = reading
    try:
        graphs = CudaGraphs(model.runner, model.attention, model.cache.padding_slot)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            graphs.capture(max_batch=4)
        # and runs as before
        graphs.forward([model.chunk(0, 0, 31)])
    finally:
        model.attention.unregister()


def test_dynamic_positions_run_without_graphs_after_one_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save_model(tmp_path, dynamic())
    job = chat_job("a", "tell fox " * 8, ignore_eos=True)
    portable, collector = make_engine(weights)
    try:
        expected = run(portable, collector, [job])[0].text()
    finally:
        portable.close()
    use_stand_ins(monkeypatch)
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    caplog.clear()
    engine, collector = make_engine(weights, kv_cache_tokens=2048)
    try:
        assert isinstance(engine.parts.runner, ModelRunner)
        (line,) = (record.getMessage() for record in caplog.records if record.levelname != "INFO")
        assert "decode runs without CUDA graphs: operation not permitted" in line
        assert run(engine, collector, [job])[0].text() == expected
    finally:
        engine.close()
