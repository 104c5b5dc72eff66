"""Steps whose halves are computed at the same time give what whole steps give."""

import threading
from collections.abc import Iterator

import pytest
import torch

from catalogue import ChatModelEntry
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from workers.engines.chat import build
from workers.engines.chat.build import EngineParts, build_engine
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.model.fused_decoder import FusedDecoder
from workers.engines.chat.model.runner import ModelRunner
from workers.engines.chat.model.split_runner import SplitRunner, StepCosts
from workers.engines.chat.sequence import Chunk


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def built(weights, **options) -> EngineParts:
    engine = {"torch_threads": 2, "max_batch_size": 8, "kv_cache_tokens": 2048, **options}
    entry = {"name": "tiny", "tasks": ["chat"], "weights": str(weights), "engine": engine}
    return build_engine(ChatModelEntry.model_validate(entry), 1.0, Metrics(), lambda request_id: None)


@pytest.fixture(scope="module")
def parts(weights) -> Iterator[EngineParts]:
    parts = built(weights)
    yield parts
    parts.free()


def split_runner(parts: EngineParts) -> SplitRunner:
    assert isinstance(parts.runner, SplitRunner)
    parts.runner.set_costs(StepCosts(0.0, 0.0, 0.0))
    return parts.runner


def test_two_threads_compute_halves_and_one_thread_whole_steps(weights, parts):
    assert isinstance(parts.runner, SplitRunner)
    assert torch.get_num_threads() == parts.torch_threads == 1
    whole = built(weights, torch_threads=1)
    assert isinstance(whole.runner, ModelRunner)


@pytest.mark.parametrize(("cores", "halves"), [(1, False), (2, True), (3, False)])
def test_by_default_a_machine_with_two_cores_computes_halves(weights, monkeypatch, cores, halves):
    monkeypatch.setattr(build, "available_cores", lambda: cores)
    monkeypatch.setattr(build, "default_threads", lambda: max(1, cores - 1))
    parts = built(weights, torch_threads=None)
    assert isinstance(parts.runner, SplitRunner) == halves
    parts.free()


def test_a_model_that_is_not_fused_is_not_split(tmp_path):
    parts = built(save_model(tmp_path, CONFIGS["gemma2"]()))
    assert isinstance(parts.runner, ModelRunner)


def test_halves_that_differ_are_not_used(weights, monkeypatch, caplog):
    right = FusedDecoder.with_attention

    def wrong(decoder, attention):
        other = right(decoder, attention)
        other._first_norm = other._first_norm._replace(weight=other._first_norm.weight * 1.05)
        return other

    monkeypatch.setattr(FusedDecoder, "with_attention", wrong)
    parts = built(weights)
    assert isinstance(parts.runner, ModelRunner)
    assert "not computed in halves" in caplog.text


def test_every_kind_of_chunk_gives_the_same_rows(parts):
    """Decode rows, drafts, prompts in one and two chunks, scored and unscored: in the order of the chunks."""
    runner = split_runner(parts)
    cache, random = parts.cache, torch.Generator().manual_seed(0)
    ids = [torch.randint(100, (40,), generator=random).tolist() for _ in range(8)]
    slots = [cache.take_slot() for _ in ids]
    for slot, tokens in zip(slots, ids, strict=True):
        cache.grow(slot, 40)
        runner.forward([Chunk(slot, 0, tokens[:20], False)])
    decode = [Chunk(slots[at], 20, ids[at][20:21], True) for at in range(4)]
    drafts = [Chunk(slots[3], 21 + at, ids[3][21 + at : 22 + at], True) for at in range(3)]
    prompts = [
        Chunk(slots[4], 20, ids[4][20:30], True),
        Chunk(slots[5], 20, ids[5][20:26], False),
        Chunk(slots[6], 20, ids[6][20:30], True, True),
        Chunk(slots[7], 20, ids[7][20:40], True),
    ]
    for chunks in (decode, decode + drafts, decode + prompts, prompts, drafts + prompts[::2], prompts[:2]):
        expected = runner._first.forward(chunks).clone()
        # the same memory as the halves', which may leave none of it unwritten
        runner._room(len(expected)).fill_(torch.nan)
        found = runner.forward(chunks)
        assert runner._middle(chunks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert len(found) == sum(len(c.tokens) if c.scored else int(c.wants_logits) for c in chunks)


def chunk(slot: int, tokens: int) -> Chunk:
    return Chunk(slot, 0, [0] * tokens, True)


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ([1], 0),
        ([30], 0),
        ([1, 1], 1),
        ([1, 1, 1], 1),
        ([1] * 8, 4),
        ([1, 1, 30, 30], 3),
        ([30, 1, 1], 0),
        ([10, 30, 30, 10], 2),
    ],
)
def test_the_halves_have_as_many_tokens_as_can_be(parts, sizes, first):
    assert split_runner(parts)._middle([chunk(at, size) for at, size in enumerate(sizes)]) == first


def test_rows_of_one_sequence_stay_together(parts):
    runner = split_runner(parts)
    assert runner._middle([chunk(3, 1)] * 8) == 0
    assert runner._middle([chunk(3, 1)] * 7 + [chunk(4, 1)]) == 0  # one half would be nearly the whole
    assert runner._middle([chunk(3, 1)] * 5 + [chunk(4, 1)] * 3) == 5


def test_a_step_is_split_only_if_that_is_faster(parts):
    runner = split_runner(parts)
    rows = [chunk(at, 1) for at in range(8)]
    runner.set_costs(StepCosts(100.0, 0.0, 0.0))
    assert runner._middle(rows) == 0
    assert runner._middle([chunk(at, 100) for at in range(8)]) == 4
    # what is done for each row on the second core takes as long as the half
    runner.set_costs(StepCosts(0.0, 0.0, 0.5))
    assert runner._middle(rows) == 0
    assert runner._middle([chunk(at, 2) for at in range(8)]) == 4
    # by the cost of attention the halves are equal when the longest context is alone
    runner.set_costs(StepCosts(0.0, 0.01, 0.0))
    assert runner._middle([Chunk(0, 999, [0], True), *(Chunk(at, 1, [0], True) for at in range(1, 8))]) == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_half_that_fails_is_awaited_and_raised(parts, monkeypatch, failing):
    runner = split_runner(parts)
    other_ended = threading.Event()
    halves = [runner._first, runner._second]

    def fail(chunks, ids=None, out=None):
        raise RuntimeError("no memory")

    def work(chunks, ids=None, out=None):
        # the failed half has long ended
        other_ended.wait(0.2)
        other_ended.set()
        return out

    for number, half in enumerate(halves):
        monkeypatch.setattr(half, "forward", fail if number == failing or failing == 2 else work)
    with pytest.raises(RuntimeError, match="no memory"):
        runner.forward([chunk(0, 1), chunk(1, 1)])
    assert other_ended.is_set() == (failing != 2)


def test_all_decode_steps_are_compared_through_both_threads(parts):
    runner = split_runner(parts)
    steps = runner.decode_steps()
    assert [step.rows for step in steps] == [1, 2, 4, 8]
    assert {step.forward for step in steps} == {runner.forward}


@pytest.mark.parametrize("options", [{}, {"num_speculative_tokens": 4}, {"kv_cache_tokens": 200}])
def test_texts_are_the_same_in_halves(weights, options, monkeypatch):
    """With drafts, and with so small a cache that sequences are preempted."""
    monkeypatch.setattr(SplitRunner, "set_costs", lambda *costs: None)
    jobs = [
        chat_job(
            f"r{at}", "a b c " * (at + 1), max_tokens=24, temperature=0.8 * (at % 2), seed=at, n=1 + at % 2
        )
        for at in range(8)
    ]
    texts = []
    for threads in (1, 2):
        engine, collector = make_engine(weights, torch_threads=threads, max_batch_size=8, **options)
        try:
            results = run(engine, collector, jobs)
        finally:
            engine.close()
        texts.append(
            [[result.text(index) for index in range(1 + at % 2)] for at, result in enumerate(results)]
        )
    assert texts[0] == texts[1]
