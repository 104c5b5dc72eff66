"""How much of a GPU's memory the KV cache gets.

The driver's and the allocator's figures are set by the tests.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from catalogue import ChatModelEntry
from tests.engines.tiny_chat import CONFIGS, save_model
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.memory import budget_tokens, peak_bytes, step_bytes
from workers.engines.chat.model.loader import LoadedModel, _read, load_model
from workers.engines.chat.model.precision import Precision

GIB = 2**30
SHAPE = CacheShape(32, 8, 128, torch.bfloat16, token_major=True)  # 128 KiB a token
TOKENS_PER_GIB = GIB // SHAPE.bytes_per_token


def entry(weights: Path | str, **options: object) -> ChatModelEntry:
    return ChatModelEntry.model_validate(
        {"name": "tiny", "tasks": ["chat"], "weights": str(weights), "engine": options}
    )


def on_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, held: int) -> LoadedModel:
    """A model on a GPU: `held` bytes are this process's, `free` ones nobody's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    return LoadedModel(None, None, None, 131072, torch.device("cuda"), "m", Precision(torch.bfloat16))


def test_the_cache_leaves_what_a_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = on_gpu(monkeypatch, free=64 * GIB, total=80 * GIB, held=16 * GIB)
    options = entry("m", max_batch_size=256, memory_fraction=0.5).engine
    tokens = budget_tokens(loaded, SHAPE, options, gpu_share=1, reserve=4 * GIB)
    assert tokens == 30 * TOKENS_PER_GIB


def test_two_workers_on_a_gpu_get_half_of_it_each_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    options = entry("m", max_batch_size=256, memory_fraction=1).engine
    first = on_gpu(monkeypatch, free=48 * GIB, total=80 * GIB, held=16 * GIB)
    alone = budget_tokens(first, SHAPE, options, gpu_share=0.5, reserve=0)
    second = on_gpu(monkeypatch, free=24 * GIB, total=80 * GIB, held=16 * GIB)
    assert budget_tokens(second, SHAPE, options, gpu_share=0.5, reserve=0) == alone == 24 * TOKENS_PER_GIB


def test_no_room_now_may_pass_and_no_room_ever_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = entry("m").engine
    loaded = on_gpu(monkeypatch, free=GIB, total=80 * GIB, held=16 * GIB)
    with pytest.raises(TemporaryLoadError, match="besides the 2048 MiB that a step needs: 1024 MiB are free"):
        budget_tokens(loaded, SHAPE, options, gpu_share=1, reserve=2 * GIB)
    loaded = on_gpu(monkeypatch, free=GIB, total=80 * GIB, held=79 * GIB)
    with pytest.raises(EngineLoadError) as caught:
        budget_tokens(loaded, SHAPE, options, gpu_share=1, reserve=2 * GIB)
    assert type(caught.value) is EngineLoadError


def test_a_step_of_each_kind_is_run_to_see_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(entry(save_model(tmp_path, CONFIGS["llama"]())))
    options = entry(tmp_path, max_batch_size=4).engine
    cache = KVCache(CacheShape(2, 2, 16, torch.float32, False), 12, 8, 4, torch.device("cpu"))
    attention: ModelAttention = PagedAttention(cache)
    peaks, steps = iter([100, 160, 100, 170]), []
    forward = loaded.model.forward

    def watched(*arguments: object, **named: object) -> object:
        steps.append(named["input_ids"].shape[1])  # type: ignore[attr-defined]
        return forward(*arguments, **named)

    loaded.model.forward = watched
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    needed = step_bytes(loaded, None, attention, cache, options, 64)
    # the first is what is recorded as a CUDA graph, with memory of its own; the last is a scored prompt
    assert steps == [4, 4, 3 + 64, 64]
    assert needed == 60 + 70
    assert (cache.num_active, cache.num_free_slots) == (0, 4)


def test_no_room_for_the_largest_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute_largest() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded = load_model(entry(save_model(tmp_path, CONFIGS["llama"]())))
    vision: Any = SimpleNamespace(compute_largest=compute_largest)
    options = entry(tmp_path, max_batch_size=4, compile=False).engine
    cache = KVCache(CacheShape(2, 2, 16, torch.float32, False), 12, 8, 4, torch.device("cpu"))
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    with pytest.raises(TemporaryLoadError, match="max_image_pixels"):
        step_bytes(replace(loaded, vision=vision), None, PagedAttention(cache), cache, options, 64)
    assert (cache.num_active, cache.num_free_slots) == (0, 4)


def test_what_a_step_frees_again_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 75)
    assert peak_bytes(lambda: None, torch.device("cuda")) == 45


class Stop(Exception):
    pass


def test_weights_go_from_their_file_to_the_gpu_if_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    def from_pretrained(*arguments: object, **named: object) -> None:
        given.update(named)
        raise Stop

    weights = save_model(tmp_path, CONFIGS["llama"]())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    with pytest.raises(Stop):
        _read(entry(weights, dtype="bfloat16"), torch.device("cuda"))
    assert given["device_map"] == {"": torch.device("cuda")}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 1000))
    with pytest.raises(EngineLoadError, match=r"the weights take .* and the GPU has"):
        _read(entry(weights, dtype="bfloat16"), torch.device("cuda"))
