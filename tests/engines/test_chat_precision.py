"""The dtype of the weights: what the catalogue says, or what suits device, checkpoint and processor."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, PreTrainedConfig

from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from workers.engines.chat.model import precision
from workers.engines.chat.model.precision import (
    REPEATS,
    ROWS,
    choose_precision,
    has_bfloat16,
    layer_shapes,
    measure_gain,
)

CPU = torch.device("cpu")


def config_of(dtype: torch.dtype | None, **others: Any) -> PreTrainedConfig:
    config = CONFIGS["llama"]()
    config.dtype = dtype
    for name, value in others.items():
        setattr(config, name, value)
    return config


def pretend(monkeypatch: pytest.MonkeyPatch, *, gain: float | None, processor: bool = True) -> None:
    """Let the processor have bfloat16, and a measurement find `gain`. None: a measurement is an error."""

    def measured(shapes: list[torch.Size]) -> float:
        assert gain is not None, "nothing is to be measured"
        return gain

    monkeypatch.setattr(precision, "has_bfloat16", lambda: processor)
    monkeypatch.setattr(precision, "measure_gain", measured)


@pytest.mark.parametrize("checkpoint", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (1.74, "bfloat16 (1.7 x as fast as float32 in a layer)"),
        (1.2, "bfloat16 (1.2 x as fast as float32 in a layer)"),
        (1.14, "float32 (bfloat16 is 1.1 x as fast in a layer)"),
        (0.5, "float32 (bfloat16 is 0.5 x as fast in a layer)"),
    ],
)
def test_a_measurement_chooses_for_a_checkpoint_of_16_bits(monkeypatch, checkpoint, gain, expected):
    pretend(monkeypatch, gain=gain)
    assert choose_precision("auto", config_of(checkpoint), CPU).describe() == expected


@pytest.mark.parametrize("named", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_catalogue_is_obeyed(monkeypatch, named, device):
    pretend(monkeypatch, gain=None, processor=False)
    chosen = choose_precision(named, config_of(torch.bfloat16), torch.device(device))
    assert (chosen.dtype, chosen.describe()) == (getattr(torch, named), named)


def test_a_gpu_has_half_precision(monkeypatch):
    pretend(monkeypatch, gain=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_precision("auto", config_of(torch.float32), torch.device("cuda")).describe() == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_checkpoint_in_float32_stays_so(monkeypatch, dtype):
    pretend(monkeypatch, gain=None)
    assert choose_precision("auto", config_of(dtype), CPU).describe() == "float32 (as the checkpoint)"


def test_a_processor_without_bfloat16_keeps_float32(monkeypatch):
    pretend(monkeypatch, gain=None, processor=False)
    chosen = choose_precision("auto", config_of(torch.bfloat16), CPU)
    assert chosen.describe() == "float32 (the processor has no bfloat16)"


def test_what_can_not_be_measured_stays_in_float32(monkeypatch):
    pretend(monkeypatch, gain=None)
    quantized = config_of(torch.bfloat16, quantization_config={"quant_method": "gptq"})
    assert choose_precision("auto", quantized, CPU).describe() == "float32 (the checkpoint is quantized)"
    other = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, dtype=torch.bfloat16)
    expected = "float32 (its layers have products of another kind)"
    assert choose_precision("auto", other, CPU).describe() == expected


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_either_extension_of_the_processor_has_bfloat16(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bfloat16() == (avx512 or amx)


def test_the_shapes_are_those_of_one_layer():
    attention, mlp = [(64, 64), (32, 64), (32, 64), (64, 64)], [(128, 64), (128, 64), (64, 128)]
    assert layer_shapes(CONFIGS["llama"]()) == attention + mlp


def test_the_gain_is_the_mean_over_rows_of_the_fastest_of_some_runs(monkeypatch):
    """Two shapes; bfloat16 takes 1, 1/2 and 1/4 of the time, and now and then something disturbs a run."""
    calls = []

    def product(weight: torch.Tensor, bias: None) -> Callable[[torch.Tensor], torch.dtype]:
        return lambda x: weight.dtype

    def seconds(timed: Callable[[torch.Tensor], torch.dtype], x: torch.Tensor) -> float:
        dtype, rows = timed(x), len(x)
        calls.append((dtype, tuple(x.shape)))
        of_float32 = rows * x.shape[1] * 1e-6
        disturbed = 1.0 if len(calls) % 4 == 1 else 0.0
        return of_float32 * (1 if dtype == torch.float32 else 0.5 ** ROWS.index(rows)) + disturbed

    monkeypatch.setattr(precision, "linear_product", product)
    monkeypatch.setattr(precision, "_seconds", seconds)
    assert measure_gain([torch.Size((8, 4)), torch.Size((4, 16))]) == pytest.approx(2.0)
    assert len(calls) == 2 * len(ROWS) * 2 * REPEATS
    assert {shape for _, shape in calls} == {(rows, width) for rows in ROWS for width in (4, 16)}


def test_a_real_measurement_finds_a_ratio():
    assert 0.01 < measure_gain([torch.Size((64, 96))]) < 100


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral"])
def test_a_checkpoint_in_bfloat16_is_read_and_served_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    pretend(monkeypatch, gain=1.7)
    weights = save_model(tmp_path, CONFIGS[family](), dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO):
        engine, collector = make_engine(weights, kv_cache_tokens=480)
    try:
        (line,) = [record.getMessage() for record in caplog.records]
        assert "CPU, bfloat16 (1.7 x as fast as float32 in a layer), attention by compiled loops" in line
        results = run(engine, collector, [chat_job("a"), chat_job("b", "goodbye")])
        assert all(result.usage.completion_tokens for result in results)
    finally:
        engine.close()
