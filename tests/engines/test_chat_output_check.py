"""The comparison at load accepts rounding and refuses every attention that isn't the model's own.

On tiny random models in float32, and on a trained model of 30 layers in bfloat16, where rounding alone
changes the logits by several percent.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from catalogue import ChatEngineOptions, ChatModelEntry
from tests.engines.tiny_chat import CONFIGS, save_model
from workers.engines.base import EngineLoadError
from workers.engines.chat.attention.base import LayerCall
from workers.engines.chat.attention.cpu import CpuPagedAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.backend import build_backend
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.layers import CompiledLayerOperations
from workers.engines.chat.model.linear import can_pack
from workers.engines.chat.model.loader import LoadedModel, cache_shape, load_model
from workers.engines.chat.model.output_check import OutputCheck
from workers.engines.chat.model.runner import ModelForward, ModelRunner
from workers.engines.chat.sequence import Chunk

FAULTS: dict[str, dict[str, Any]] = {
    "its scores are a tenth too large": {"scale": 1.1},
    "its scores are no numbers": {"scale": math.nan},
    "a sink takes part of each weight": {"sink": True},
    "a token does not see itself": {"own_key": False},
    "a token sees twelve keys": {"window": 12},
    "the first key is missing": {"first_key": False},
    "distant keys count less (ALiBi)": {"alibi": True},
    "query heads read other key heads": {"wrong_heads": True},
    "sequences of one step are mixed": {"mixed": True},
}


class Attention(PagedAttention):
    """Attention over the pages, one sequence after another in float32, with faults."""

    def __init__(
        self,
        cache: KVCache,
        *,
        scale: float = 1.0,
        sink: bool = False,
        own_key: bool = True,
        window: int | None = None,
        first_key: bool = True,
        alibi: bool = False,
        wrong_heads: bool = False,
        mixed: bool = False,
    ) -> None:
        super().__init__(cache)
        self._scale, self._sink, self._own_key, self._window = scale, sink, own_key, window
        self._first_key, self._alibi, self._wrong_heads = first_key, alibi, wrong_heads
        self._mixed = mixed

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        self._store(layer, key, value)
        parts = query.split([len(chunk.tokens) for chunk in self._chunks])
        out = [self._attend(layer, *of) for of in zip(self._chunks, parts, [call] * len(parts), strict=True)]
        decoding = all(len(chunk.tokens) == 1 for chunk in self._chunks)
        return torch.cat(out[::-1] if self._mixed and decoding else out)

    def _attend(self, layer: int, chunk: Chunk, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """query [tokens, heads, head_dim] -> the same."""
        heads = query.shape[1]
        pages = self._cache.pool[layer][:, self._cache.pages_of(chunk.slot)]
        # [2, kv_heads, keys, head_dim]
        held = pages.transpose(1, 2).flatten(2, 3)[:, :, : chunk.end].float()
        group = heads // held.shape[1]
        held = held.repeat(1, group, 1, 1) if self._wrong_heads else held.repeat_interleave(group, 1)
        scores = query.transpose(0, 1).float() @ held[0].transpose(1, 2) * call.scale * self._scale
        at, of = torch.arange(chunk.start, chunk.end)[:, None], torch.arange(chunk.end)
        if self._alibi:
            scores -= 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)[:, None, None] * (at - of)
        seen = of <= at
        if not self._own_key:
            seen &= (of < at) | (at == 0)
        if not self._first_key:
            seen &= (of > 0) | (at == 0)
        if self._window is not None:
            seen &= of > at - self._window
        scores = scores.masked_fill(~seen, -torch.inf)
        if self._sink:
            scores = torch.cat([scores, torch.zeros(heads, len(chunk.tokens), 1)], -1)
        weights = scores.softmax(-1)[..., : chunk.end]
        return (weights @ held[1]).to(query.dtype).transpose(0, 1)


class Checked(NamedTuple):
    """A loaded model, a cache for it, and the check that holds its own logits."""

    loaded: LoadedModel
    cache: KVCache
    check: OutputCheck

    def judge(self, attention: PagedAttention, fused: bool = False) -> None:
        """Raise EngineLoadError if the model's output with `attention` isn't its own.

        `fused`: through FusedDecoder with compiled operations.
        """
        model = self.loaded.model
        runner = ModelRunner(ModelForward(model), attention, torch.device("cpu"))
        model.set_attn_implementation(attention.register())
        try:
            if fused:
                # through transformers' layers, which tell attention each layer's arguments
                runner.forward([Chunk(self.cache.padding_slot, 0, [0], True)])
                operations = CompiledLayerOperations(model, attention, self.loaded.max_context)
                runner.model_forward = FusedDecoder(model, join_weights(model), attention, operations)
            self.check(runner)
        finally:
            attention.unregister()


def checked(
    weights: Path,
    dtype: str,
    *,
    slots: int = 8,
    pages: int = 16,
    max_context: int = 1024,
    cache_dtype: torch.dtype | None = None,
) -> Checked:
    engine = {"dtype": dtype, "max_context": max_context}
    entry = {"name": "model", "tasks": ["chat"], "weights": str(weights), "engine": engine}
    loaded = load_model(ChatModelEntry.model_validate(entry))
    # as on a GPU, unless `cache_dtype` says otherwise
    shape = cache_shape(loaded, token_major=False)._replace(dtype=cache_dtype or loaded.model.dtype)
    cache = KVCache(shape, pages, 24, slots, torch.device("cpu"))
    return Checked(loaded, cache, OutputCheck(loaded, cache))


def build(loaded: LoadedModel, dtype: str) -> None:
    """Build the backend that the engine would use. Raises EngineLoadError, or logs what it can't use."""
    options = ChatEngineOptions(dtype=dtype, kv_cache_tokens=480)
    build_backend(loaded, options, prefill_chunk=64, gpu_share=1.0, halves=False)


@pytest.fixture(scope="module", params=["llama", "qwen3", "mixtral"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return checked(save_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]()), "float32")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["as on a GPU", "as on a CPU"])
def trained(request: pytest.FixtureRequest, smollm2: Path) -> Checked:
    """A model with weights in bfloat16, and a cache as on either device."""
    return checked(smollm2, "bfloat16", cache_dtype=request.param)


@pytest.fixture(scope="module")
def fusable(smollm2: Path) -> Checked:
    """A model with weights in bfloat16, which FusedDecoder computes on a CPU."""
    return checked(smollm2, "bfloat16", cache_dtype=torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tiny_model_in_float32_is_refused_with_any_fault(tiny: Checked, fault: str) -> None:
    with pytest.raises(EngineLoadError, match="attention is not the standard one"):
        tiny.judge(Attention(tiny.cache, **FAULTS[fault]))


def test_a_tiny_model_in_float32_is_accepted_without_faults(tiny: Checked) -> None:
    tiny.judge(Attention(tiny.cache))
    tiny.judge(PagedAttention(tiny.cache))
    assert tiny.cache.num_active == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_trained_model_in_bfloat16_is_refused_with_any_fault(trained: Checked, fault: str) -> None:
    with pytest.raises(EngineLoadError, match="attention is not the standard one"):
        trained.judge(Attention(trained.cache, **FAULTS[fault]))


@pytest.mark.slow
def test_a_trained_model_in_bfloat16_is_accepted_without_faults(trained: Checked) -> None:
    trained.judge(Attention(trained.cache))
    trained.judge(PagedAttention(trained.cache))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fused_pass_with_weights_in_bfloat16_is_refused_with_any_fault(
    fusable: Checked, fault: str
) -> None:
    given = FAULTS[fault]
    if "scale" in given and not can_pack(torch.ones(1, 1, dtype=torch.bfloat16)):
        # without the processor's own products in bfloat16, which `auto` requires, the model itself rounds
        # more
        given = {"scale": 1 + 2 * (given["scale"] - 1)}
    with pytest.raises(EngineLoadError, match="attention is not the standard one"):
        fusable.judge(Attention(fusable.cache, **given), fused=True)


@pytest.mark.slow
def test_a_fused_pass_with_weights_in_bfloat16_is_accepted_without_faults(fusable: Checked) -> None:
    fusable.judge(CpuPagedAttention(fusable.cache), fused=True)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "deviation"), [(30, 0.02), (30, 0.1), (60, 0.2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_in_a_deep_random_model_is_accepted_and_a_sink_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layers: int, deviation: float, dtype: str
) -> None:
    """Random layers amplify each rounding: the deepest one's logits change by a third of their deviation."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.initializer_range = layers, deviation
    deep = checked(save_model(tmp_path, config), dtype)
    deep.judge(Attention(deep.cache))
    with pytest.raises(EngineLoadError):
        deep.judge(Attention(deep.cache, sink=True))
    build(deep.loaded, dtype)
    assert not caplog.records


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "qwen2", "qwen3"])
def test_every_family_is_accepted_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """Gemma 2 has a softcap, and therefore only one attention implementation to measure rounding by."""
    small = checked(save_model(tmp_path, CONFIGS[family]()), "bfloat16")
    build(small.loaded, "bfloat16")
    assert not caplog.records


def test_a_wrong_second_implementation_does_not_excuse_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding is measured by it, as the difference from the eager one."""
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrong(*arguments: Any, **others: Any) -> tuple[torch.Tensor, None]:
        out, _ = right(*arguments, **others)
        return -out, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", wrong)
    model = checked(save_model(tmp_path, CONFIGS["llama"]()), "bfloat16")
    model.judge(Attention(model.cache))
    with pytest.raises(EngineLoadError):
        model.judge(Attention(model.cache, mixed=True))


@pytest.mark.parametrize("room", [{"slots": 1}, {"pages": 2}, {"max_context": 16}])
def test_prompts_that_do_not_fit_together_are_compared_in_turn(tmp_path: Path, room: dict[str, Any]) -> None:
    narrow = checked(save_model(tmp_path, CONFIGS["llama"]()), "float32", **room)
    narrow.judge(PagedAttention(narrow.cache))
    with pytest.raises(EngineLoadError):
        narrow.judge(Attention(narrow.cache, own_key=False))
    assert narrow.cache.num_active == 0
