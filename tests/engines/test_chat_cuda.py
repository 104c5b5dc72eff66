"""The GPU path on a CPU: stand-ins replace FlashAttention and CUDA graphs.

Everything around them is the real code.
"""

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.engines.flash_model import FlashModel
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from tests.engines.tiny_vision import FAMILIES, Reference, image_job, png
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from tests.gpu_stand_ins.graphs import RecordedOperations, recorded
from workers.engines.chat import backend
from workers.engines.chat.attention import flash
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.cuda_graphs import CudaGraphs
from workers.engines.chat.model.fused_decoder import FusedDecoder, join_weights
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.model.runner import ModelRunner
from workers.engines.chat.sequence import Chunk


@pytest.fixture
def kernel(monkeypatch) -> FlashAttentionStandIn:
    made = FlashAttentionStandIn()
    monkeypatch.setattr(flash, "varlen_attn", made)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedOperations)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # compiled loops are not operations that a graph could repeat
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [LayerOperations])
    return made


@pytest.fixture(params=["llama", "mistral", "qwen3"])
def setup(request, kernel):
    made = FlashModel(request.param)
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
    operations = LayerOperations(setup.model, setup.attention, max_context=64)
    setup.runner.model_forward = FusedDecoder(
        setup.model, join_weights(setup.model), setup.attention, operations
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
    recordings: dict[tuple[int, int], Any] = dict(graphs._recordings)
    return {size: recording.graph.replays for (size, _), recording in recordings.items()}


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


MANY_HEADS = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=8,
    max_position_embeddings=8192,
    initializer_range=0.2,
)
"""The heads of a model of 8 billion parameters: the kernel would split contexts for 2 to 6 sequences."""


@pytest.mark.parametrize("key_heads", [8, 32])
def test_several_streams_get_the_texts_that_each_gets_alone(tmp_path, kernel, monkeypatch, key_heads):
    MANY_HEADS.num_key_value_heads = key_heads
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    weights = save_model(tmp_path, MANY_HEADS)
    engine, collector = make_engine(weights, kv_cache_tokens=65536, prefix_cache=False, max_batch_size=8)
    try:
        assert isinstance(engine.parts.runner, CudaGraphs)
        jobs = [chat_job(f"a{i}", f"tell {i} fox " * 8, max_tokens=12, ignore_eos=True) for i in range(8)]
        alone = [run(engine, collector, [job])[0].text() for job in jobs]
        for count in (2, 4, 6, 8):
            jobs = [
                chat_job(f"n{count}-{i}", f"tell {i} fox " * 8, max_tokens=12, ignore_eos=True)
                for i in range(count)
            ]
            assert [result.text() for result in run(engine, collector, jobs)] == alone[:count]
        wrong = [call for call in kernel.calls if call.splits > 1 and not call.grouped]
        assert not wrong
        # one stream with shared key heads needs the parts: it would occupy 8 of 132 multiprocessors
        assert any(call.splits > 1 for call in kernel.calls) == (key_heads == 8)
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_chats_with_images_are_decoded_by_graphs(tmp_path, kernel, monkeypatch, family):
    """The decode steps after an image need no recordings of their own."""
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    weights = FAMILIES[family].save(tmp_path)
    reference = Reference(weights)
    engine, collector = make_engine(weights, kv_cache_tokens=8192, prefill_chunk=16, max_batch_size=4)
    try:
        assert isinstance(engine.parts.runner, CudaGraphs)
        assert engine.status().takes_images
        at_load = sum(replays(engine.parts.runner).values())
        jobs = [image_job("one", png()), image_job("two", png(84, 140, 1), png(140, 56, 2)), chat_job("text")]
        results = run(engine, collector, jobs)
        for job, result in zip(jobs[:2], results, strict=False):
            assert result.text() == reference.greedy(job)[0]
        assert sum(replays(engine.parts.runner).values()) > at_load
    finally:
        engine.close()


def kernel_that_splits(kernel: FlashAttentionStandIn, wrong_with: Any) -> Any:
    """The kernel, as if flash.py left the number of splits to it where `wrong_with` queries, keys, rows
    says."""

    def varlen_attn(*arguments, num_splits, seqused_k, **others):
        if wrong_with(arguments[5], arguments[6], len(seqused_k)):
            num_splits = None
        return kernel(*arguments, num_splits=num_splits, seqused_k=seqused_k, **others)

    return varlen_attn


@pytest.mark.parametrize(
    ("heads", "wrong_with"),
    [
        (32, lambda queries, keys, rows: True),
        (16, lambda queries, keys, rows: queries > 1),
        (16, lambda queries, keys, rows: (queries, rows) == (1, 2)),
        (16, lambda queries, keys, rows: (queries, rows) == (1, 8)),
        (64, lambda queries, keys, rows: queries == 1),
    ],
    ids=["all calls", "prefill", "decode of 2 rows", "decode of 8 rows", "64 heads: up to 3 rows"],
)
def test_a_kernel_that_splits_contexts_is_refused_at_load(
    tmp_path, kernel, monkeypatch, caplog, heads, wrong_with
):
    config = copy.deepcopy(MANY_HEADS)
    config.num_attention_heads = config.num_key_value_heads = heads
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    monkeypatch.setattr(flash, "varlen_attn", kernel_that_splits(kernel, wrong_with))
    engine, _ = make_engine(save_model(tmp_path, config), kv_cache_tokens=8192, max_batch_size=8)
    try:
        assert "the portable attention is used instead" in caplog.text
        assert any(call.splits > 1 for call in kernel.calls)
        assert isinstance(engine.parts.attention, PagedAttention)
    finally:
        engine.close()


@pytest.mark.parametrize(("size", "bound"), [(1, 2048), (4, 8192), (12, 2048), (12, 8192)])
def test_one_wrong_recording_is_found_at_load(tmp_path, kernel, monkeypatch, caplog, size, bound):
    """It gives the logits of the step before it."""
    capture = CudaGraphs.capture

    def capture_wrongly(graphs, max_batch):
        capture(graphs, max_batch)
        assert set(graphs._recordings) == set(itertools.product((1, 2, 4, 8, 12), (2048, 8192)))
        graphs._recordings[size, bound].graph.replay = lambda: None

    monkeypatch.setattr(CudaGraphs, "capture", capture_wrongly)
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    engine, _ = make_engine(save_model(tmp_path, MANY_HEADS), kv_cache_tokens=8192, max_batch_size=12)
    try:
        assert isinstance(engine.parts.runner, ModelRunner)
        assert isinstance(engine.parts.attention, FlashPagedAttention)
        assert (
            f"without CUDA graphs: LlamaForCausalLM can't be served: its attention is not the standard"
            f" one in a decode step (rows: {size}, contexts: up to {bound})" in caplog.text
        )
    finally:
        engine.close()


def test_a_step_of_both_kinds_is_two_calls_of_the_kernel(setup, kernel):
    setup.prefill()
    kernel.calls.clear()
    setup.runner.forward([setup.chunk(2, 8, 9), setup.chunk(0, 31, 44), setup.chunk(1, 20, 29)])
    layers = setup.model.config.num_hidden_layers
    assert [(call.sequences, call.longest_query) for call in kernel.calls] == [(1, 1), (2, 13)] * layers


def test_a_refused_attention_keeps_no_memory(tmp_path, kernel, monkeypatch, caplog):
    pools = []
    make = KVCache.__init__

    def remembered(cache, *arguments):
        make(cache, *arguments)
        pools.append(weakref.ref(cache.pool))

    def wrong(*arguments, scale, **others):
        assert len([pool for pool in pools if pool() is not None]) == 1
        return kernel(*arguments, scale=1.5 * scale, **others)

    monkeypatch.setattr(KVCache, "__init__", remembered)
    monkeypatch.setattr(flash, "varlen_attn", wrong)
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    known = set(ALL_ATTENTION_FUNCTIONS)
    engine, _ = make_engine(save_model(tmp_path, CONFIGS["llama"]()), kv_cache_tokens=4096)
    try:
        assert "the portable attention is used instead" in caplog.text
        first, second = pools
        assert first() is None
        assert second() is engine.parts.cache.pool
        assert len(set(ALL_ATTENTION_FUNCTIONS) - known) == 1
    finally:
        engine.close()
