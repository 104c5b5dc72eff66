"""The GPU path on a CPU: plain functions replace FlashAttention and CUDA graphs.

Everything around them is the real code.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.engines.tiny_chat import CONFIGS
from workers.engines.chat.attention import flash
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.runner import ModelForward, ModelRunner
from workers.engines.chat.sequence import Chunk

LENGTHS = (45, 30, 9)


@torch.library.custom_op("tests::plain_varlen", mutates_args=())
def plain_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Attention as varlen_attn documents it, one sequence after another.

    One operation, so that a graph can repeat it.
    """
    out = torch.empty_like(query)
    for number, count in enumerate(key_lengths.tolist()):
        start, end = int(query_starts[number]), int(query_starts[number + 1])
        pages = block_table[number].long()
        own_keys, own_values = (pool[pages].flatten(0, 1)[:count].transpose(0, 1) for pool in (keys, values))
        at = torch.arange(count - (end - start), count)[:, None]
        seen = torch.arange(count)[None] <= at
        if window >= 0:
            seen &= torch.arange(count)[None] >= at - window
        result = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            own_keys[None],
            own_values[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[2],
        )
        out[start:end] = result[0].transpose(0, 1)
    return out


def varlen_attn(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Stands in for torch.nn.attention.varlen.varlen_attn."""
    assert query_starts.dtype == key_starts.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != keys.shape[2]) and window_size[1] == 0
    assert longest_query >= int(query_starts.diff().max()) and longest_key >= int(seqused_k.max())
    return plain_varlen(query, keys, values, query_starts, seqused_k, block_table, scale, window_size[0])


class RecordedOperations(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: keeps operations and their tensors, and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self._operations:
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                result.copy_(again)


@contextmanager
def recorded(graph: RecordedOperations, pool: int | None, capture_error_mode: str):
    """Stands in for torch.cuda.graph."""
    with graph:
        yield


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(flash, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedOperations)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Setup:
    """A random model behind FlashPagedAttention, some sequences, and the model's logits after each."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(0)
        config = CONFIGS[family]()
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.sequences = [torch.randint(0, 500, (length,)).tolist() for length in LENGTHS]
        with torch.inference_mode():
            own = [self.model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in self.sequences]
        self.expected = torch.stack(own)
        head_dim = getattr(config, "head_dim", None) or 16
        shape = CacheShape(2, 2, head_dim, torch.float32, token_major=True)
        self.cache = KVCache(shape, 20, 8, 4, torch.device("cpu"))
        self.attention = FlashPagedAttention(self.cache, max_context=64)
        self.model.set_attn_implementation(self.attention.register())
        self.runner = ModelRunner(ModelForward(self.model), self.attention, torch.device("cpu"))
        self.slots = []
        for tokens in self.sequences:
            self.slots.append(self.cache.take_slot())
            self.cache.grow(self.slots[-1], len(tokens))

    def chunk(self, number: int, start: int, end: int) -> Chunk:
        tokens = self.sequences[number]
        return Chunk(self.slots[number], start, tokens[start:end], end == len(tokens))

    def prefill(self) -> None:
        """Compute all tokens but each sequence's last, in chunks of different lengths."""
        self.runner.forward([self.chunk(0, 0, 31), self.chunk(1, 0, 20)])
        self.runner.forward([self.chunk(2, 0, 8), self.chunk(0, 31, 44), self.chunk(1, 20, 29)])

    def last_tokens(self) -> list[Chunk]:
        return [self.chunk(number, length - 1, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(params=["llama", "mistral", "qwen3"])
def setup(request, stand_ins):
    made = Setup(request.param)
    yield made
    made.attention.unregister()


def test_prefill_chunks_and_decode_rows_give_the_models_own_logits(setup):
    setup.prefill()
    found = setup.runner.forward(setup.last_tokens())
    torch.testing.assert_close(found, setup.expected, atol=1e-4, rtol=1e-4)
    windows = [24, 24] if setup.model.config.model_type == "mistral" else [None, None]
    assert [call.window for call in setup.attention.layers.values()] == windows


def test_the_fused_decoder_gives_the_same(setup):
    setup.prefill()
    setup.runner.model_forward = FusedDecoder(
        setup.model, join_weights(setup.model), setup.attention, max_context=64
    )
    found = setup.runner.forward(setup.last_tokens())
    torch.testing.assert_close(found, setup.expected, atol=1e-4, rtol=1e-4)


def test_rows_that_only_pad_a_batch_change_no_other_row(setup):
    setup.prefill()
    padding = Chunk(setup.cache.padding_slot, 0, [0], True)
    padded = setup.runner.forward(setup.last_tokens() + [padding] * 5)
    torch.testing.assert_close(padded[:3], setup.expected, atol=1e-4, rtol=1e-4)
    assert bool(torch.isfinite(padded).all())


def replays(graphs: CudaGraphs) -> dict[int, int]:
    """By number of rows, how often a recording was replayed."""
    recordings: dict[int, Any] = dict(graphs._recordings)
    return {size: recording.graph.replays for size, recording in recordings.items()}


def test_a_replayed_graph_gives_the_models_own_logits(setup):
    setup.prefill()
    graphs = CudaGraphs(setup.runner, setup.attention, setup.cache.padding_slot)
    graphs.capture(max_batch=4)
    assert replays(graphs) == {1: 0, 2: 0, 4: 0}
    last = setup.last_tokens()
    for chunks, size in ((last, 4), (last[:2], 2), (last[2:], 1), (last, 4)):
        before = replays(graphs)
        found = graphs.forward(chunks)
        assert replays(graphs) == before | {size: before[size] + 1}
        rows = [last.index(chunk) for chunk in chunks]
        torch.testing.assert_close(found, setup.expected[rows], atol=1e-4, rtol=1e-4)


def test_only_decode_steps_of_a_recorded_size_are_replayed(setup):
    graphs = CudaGraphs(setup.runner, setup.attention, setup.cache.padding_slot)
    graphs.capture(max_batch=2)
    graphs.forward([setup.chunk(0, 0, 31), setup.chunk(1, 0, 20)])
    graphs.forward([setup.chunk(2, 0, 8), setup.chunk(0, 31, 44), setup.chunk(1, 20, 29)])
    torch.testing.assert_close(graphs.forward(setup.last_tokens()), setup.expected, atol=1e-4, rtol=1e-4)
    assert replays(graphs) == {1: 0, 2: 0}
