"""Decode steps that are launched before the tokens of the step before are read: the same texts.

On a CPU a launched step is computed at once, but its tokens are read one step late, as on a GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.tiny_chat import CONFIGS, Collector, chat_job, make_engine, run, save_model, together
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from tests.gpu_stand_ins.graphs import RecordedOperations, recorded
from workers.engines.chat import ChatEngine, backend
from workers.engines.chat.attention import flash
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.pipeline import DecodePipeline


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def pipelined(weights: Path, **options: Any) -> tuple[ChatEngine, Collector]:
    engine, collector = make_engine(weights, **options)
    parts = engine.parts
    parts.pipeline = DecodePipeline(parts.cache, parts.scheduler, parts.runner, parts.sampler)
    return engine, collector


def jobs(count: int) -> list[Any]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "n": 3},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 1.0, "min_tokens": 9, "stop": ["o", "e"], "ignore_eos": False},
        {"temperature": 1.0, "max_tokens": 1, "logprobs": 2},
        {"temperature": 1.0, "stop_token_ids": list(range(200)), "min_tokens": 3},
    ]
    return [
        chat_job(
            f"p{at}",
            f"{at} fox",
            **{"seed": at, "max_tokens": 8 + at % 23, "ignore_eos": True, **kinds[at % len(kinds)]},
        )
        for at in range(count)
    ]


def outcome(result: Any) -> Any:
    choices = sorted({event.index for event in result.events[:-1]})
    return [(result.text(index), result.finish(index)) for index in choices], result.events[-1]


def outcomes(engine: ChatEngine, collector: Collector, count: int) -> list[Any]:
    try:
        return [outcome(result) for result in run(engine, collector, jobs(count))]
    finally:
        engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache_tokens": 480, "prefix_cache": False}, {"max_batch_size": 3}],
    ids=["roomy", "with preemptions", "with waiting requests"],
)
def test_texts_ends_and_usage_are_those_of_single_steps(weights: Path, options: dict[str, Any]) -> None:
    expected = outcomes(*make_engine(weights, **options), 120)
    engine, collector = pipelined(weights, **options)
    launched = 0
    launch_after = engine.parts.pipeline.launch_after  # type: ignore[union-attr]

    def counted(step: Any) -> Any:
        nonlocal launched
        after = launch_after(step)
        launched += after is not None
        return after

    engine.parts.pipeline.launch_after = counted  # type: ignore[union-attr, method-assign]
    assert outcomes(engine, collector, 120) == expected
    assert launched > 20
    assert (engine.metrics.preemptions > 0) == ("kv_cache_tokens" in options)
    assert (engine.parts.cache.num_active, engine.parts.scheduler.running) == (0, [])


def test_a_cancelled_request_ends_while_its_next_step_is_computed(weights: Path) -> None:
    engine, collector = pipelined(weights)
    try:
        with together(engine):
            for name in ("kept", "cancelled"):
                engine.submit(chat_job(name, name, max_tokens=900, ignore_eos=True))
        collector.wait_first("cancelled")
        engine.cancel("cancelled", "cancelled")
        assert collector.result("cancelled").failed.code == "cancelled"
        assert collector.result("kept").usage.completion_tokens == 900
    finally:
        engine.close()


def test_new_requests_are_started_beside_a_long_stream(weights: Path) -> None:
    engine, collector = pipelined(weights)
    try:
        engine.submit(chat_job("long", max_tokens=900, ignore_eos=True))
        collector.wait_first("long")
        for at in range(5):
            (short,) = run(
                engine, collector, [chat_job(f"short{at}", f"{at}", max_tokens=5, ignore_eos=True)]
            )
            assert short.usage.completion_tokens == 5
        assert "long" in engine.parts.outputs.by_id
    finally:
        engine.close()


def test_a_step_that_cannot_be_launched_is_computed_in_the_usual_way(weights: Path) -> None:
    job = chat_job("a", "fox", max_tokens=60, ignore_eos=True)
    engine, collector = make_engine(weights)
    (expected,) = run(engine, collector, [job])
    engine.close()
    engine, collector = pipelined(weights)
    forward, calls = engine.parts.runner.forward, 0

    def fails_at_times(chunks: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (5, 6, 11, 20):
            raise torch.OutOfMemoryError("no memory for a step")
        return forward(chunks, ids)

    pipeline: Any = engine.parts.pipeline
    pipeline._runner = type("Failing", (), {"forward": staticmethod(fails_at_times)})()
    try:
        (found,) = run(engine, collector, [job])
        assert calls > 20
        assert (found.text(), found.usage) == (expected.text(), expected.usage)
    finally:
        engine.close()


def test_graphs_read_the_tokens_where_they_were_chosen(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcomes(*make_engine(weights), 24)
    monkeypatch.setattr(flash, "varlen_attn", FlashAttentionStandIn())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedOperations)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [LayerOperations])
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    engine, collector = pipelined(weights, kv_cache_tokens=16384, max_batch_size=8)
    assert isinstance(engine.parts.runner, CudaGraphs)
    assert outcomes(engine, collector, 24) == expected
