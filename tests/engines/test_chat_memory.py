"""The KV cache: budget, mixed lengths, preemption, prefixes, chunks, invariants of the bookkeeping."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from protocol.events import Finished
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model, together
from workers.engines.chat.cache import prefix_cache
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache, OutOfPages
from workers.engines.chat.cache.prefix_cache import PrefixCache
from workers.engines.chat.sequence import Chunk

PAGE = 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def texts(weights, jobs, **options):
    """Run the jobs in a new engine. Returns their texts, and the closed engine for its counters."""
    engine, collector = make_engine(weights, **options)
    try:
        return [result.text() for result in run(engine, collector, jobs)], engine
    finally:
        engine.close()


def mixed_jobs(count: int) -> list:
    return [
        chat_job(f"m{i}", "fox " * (3 + 11 * (i % 5)) + str(i), max_tokens=30 + 9 * (i % 4), ignore_eos=True)
        for i in range(count)
    ]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_more_requests_than_fit_are_preempted_and_resumed_with_the_same_text(weights, prefix_cache):
    jobs = mixed_jobs(12)
    expected, roomy = texts(weights, jobs)
    found, tight = texts(weights, jobs, kv_cache_tokens=312, prefix_cache=prefix_cache)
    assert roomy.metrics.preemptions == 0
    assert tight.metrics.preemptions > 0
    assert tight.parts.kv_cache_tokens == 312
    assert found == expected


def test_sampled_text_survives_preemption_too(weights):
    jobs = [
        chat_job(f"s{i}", f"{i} fox", temperature=1.0, top_p=0.9, seed=i, max_tokens=70, ignore_eos=True, n=2)
        for i in range(6)
    ]
    expected, _ = texts(weights, jobs)
    found, tight = texts(weights, jobs, kv_cache_tokens=256)
    assert tight.metrics.preemptions > 0
    assert found == expected


def test_the_budget_bounds_the_context_and_is_known_before_the_first_request(weights):
    engine, collector = make_engine(weights, kv_cache_tokens=130)
    try:
        assert engine.parts.kv_cache_tokens == engine.parts.max_context == 120
        long, fits = run(
            engine, collector, [chat_job("l", "fox " * 200), chat_job("f", max_tokens=999, ignore_eos=True)]
        )
        assert long.failed.code == "context_length_exceeded"
        assert fits.usage.prompt_tokens + fits.usage.completion_tokens == 120
    finally:
        engine.close()


def test_memory_held_follows_the_tokens_with_one_long_among_short_ones(tmp_path):
    """At most 1.3 times what the tokens need, in every step once all are running."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 4096
    engine, collector = make_engine(save_model(tmp_path, config), prefix_cache=False, max_batch_size=32)
    ratios: list[float] = []
    emit = engine._callback

    def watch(events):
        running = engine.parts.scheduler.running
        if len(running) == 32 and all(sequence.output for sequence in running):
            held = engine.parts.cache.num_active * engine.parts.cache.page_size
            ratios.append(held / sum(sequence.length for sequence in running))
        emit(events)

    engine._callback = watch
    try:
        jobs = [chat_job("long", "fox " * 2980, max_tokens=300, ignore_eos=True)]
        jobs += [chat_job(f"short{i}", "fox " * 15, max_tokens=220 + i, ignore_eos=True) for i in range(31)]
        results = run(engine, collector, jobs)
        assert results[0].usage.prompt_tokens > 2900
        assert len(ratios) > 20
        assert max(ratios) <= 1.3
        assert engine.parts.cache.num_active == 0
    finally:
        engine.close()


def test_an_earlier_prompt_is_not_computed_again(weights):
    engine, collector = make_engine(weights)
    try:
        system = "and then again the quick brown fox " * 6
        (first,) = run(engine, collector, [chat_job("a", system + "one", max_tokens=40, ignore_eos=True)])
        (again,) = run(engine, collector, [chat_job("b", system + "two", max_tokens=40, ignore_eos=True)])
        assert first.usage.cached_tokens == 0
        assert again.usage.cached_tokens >= again.usage.prompt_tokens - 2 * engine.parts.cache.page_size
        assert engine.metrics.cached_tokens == again.usage.cached_tokens
    finally:
        engine.close()
    (alone,), _ = texts(weights, [chat_job("c", system + "two", max_tokens=40, ignore_eos=True)])
    assert again.text() == alone


def test_without_a_prefix_cache_nothing_is_reused(weights):
    engine, collector = make_engine(weights, prefix_cache=False)
    try:
        for id in ("a", "b"):
            (result,) = run(engine, collector, [chat_job(id, "again the fox " * 20)])
            assert result.usage.cached_tokens == 0
    finally:
        engine.close()


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on(weights):
    engine, collector = make_engine(weights, prefill_chunk=32, prefix_cache=False)
    engine.parts.scheduler.step_overhead = 20.0
    try:
        engine.submit(chat_job("running", max_tokens=900, ignore_eos=True))
        collector.wait_first("running")
        before = engine.parts.outputs.by_id["running"].sequences[0].output.copy()
        (long,) = run(engine, collector, [chat_job("long", "fox " * 400, max_tokens=2)])
        chunks = engine.metrics.prefill_chunks - 1
        gained = len(engine.parts.outputs.by_id["running"].sequences[0].output) - len(before)
        assert chunks >= long.usage.prompt_tokens // 32
        # every chunk shared its step with a token of the running request
        assert gained >= chunks
    finally:
        engine.close()


def test_a_short_prompt_overtakes_a_long_one_that_is_being_computed(weights):
    engine, collector = make_engine(weights, prefill_chunk=32, prefix_cache=False)
    try:
        order: list[str] = []
        emit = engine._callback

        def note(events):
            order.extend(request_id for request_id, _ in events)
            emit(events)

        engine._callback = note
        with together(engine):
            engine.submit(chat_job("long", "fox " * 900, max_tokens=1, ignore_eos=True))
            engine.submit(chat_job("short", max_tokens=1, ignore_eos=True))
        for id in ("long", "short"):
            assert collector.result(id).usage.completion_tokens == 1
        assert order[0] == "short"
    finally:
        engine.close()


# ----- the bookkeeping alone


def small_cache(num_pages: int = 12, slots: int = 5) -> KVCache:
    shape = CacheShape(1, 1, 1, torch.float32, token_major=False)
    return KVCache(shape, num_pages, PAGE, slots, torch.device("cpu"))


def write(cache: KVCache, slot: int, tokens: list[int], start: int = 0) -> None:
    """Write tokens from `start` on. The key of a token is the token itself, its value the position."""
    pages, offsets = cache.places([Chunk(slot, start, tokens[start:], False)])
    cache.pool[0, 0, pages, 0, offsets, 0] = torch.tensor(tokens[start:], dtype=torch.float32)
    cache.pool[0, 1, pages, 0, offsets, 0] = torch.arange(start, len(tokens), dtype=torch.float32)


def read(cache: KVCache, slot: int, count: int) -> list[tuple[int, int]]:
    """Read (key, value) of the first `count` tokens."""
    pages, offsets = cache.places([Chunk(slot, 0, [0] * count, False)])
    keys, values = (cache.pool[0, kind, pages, 0, offsets, 0].int().tolist() for kind in (0, 1))
    return list(zip(keys, values, strict=True))


def assert_whole(cache: KVCache, prefixes: PrefixCache, held: Iterable[int]) -> None:
    """Every page is either free or held, its uses are counted, and what is known of it can be looked up."""
    used = Counter(page for slot in held for page in cache.pages_of(slot))
    assert [cache._uses[page] for page in range(cache.num_pages)] == [
        used[page] for page in range(cache.num_pages)
    ]
    assert sorted([*used, *cache._free]) == list(range(cache.num_pages))
    assert len(cache._free_slots) + len(list(held)) == len(cache.held) - 1
    assert cache.kept == set(prefixes._keys) == set(prefixes._serials)
    assert prefixes._pages == {key: page for page, keys in prefixes._keys.items() for key in keys}


@pytest.mark.parametrize("beginning", [2, 32], ids=["beginnings of pages", "full pages only"])
@pytest.mark.parametrize("seed", range(6))
def test_random_operations_never_mix_pages(seed, beginning, monkeypatch):
    """Compares random growing, forking, releasing, storing and finding with a plain dictionary."""
    monkeypatch.setattr(prefix_cache, "BEGINNING", beginning)
    chance = random.Random(seed)
    cache = small_cache()
    prefixes = PrefixCache(cache)
    held: dict[int, list[int]] = {}
    found = shared = 0
    for _ in range(900):
        action = chance.random()
        if action < 0.35 and cache.num_free_slots:
            tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 18))]
            slot = cache.take_slot()
            try:
                have = prefixes.start(slot, prefixes.match(tokens[:-1]), len(tokens))
            except OutOfPages:
                cache.release(slot)
                continue
            found += have
            write(cache, slot, tokens, have)
            held[slot] = tokens
        elif action < 0.45 and held and cache.num_free_slots:
            source, slot = chance.choice(list(held)), cache.take_slot()
            try:
                cache.fork(source, slot, len(held[source]))
            except OutOfPages:
                cache.release(slot)
                continue
            held[slot] = list(held[source])
        elif action < 0.7 and held:
            slot = chance.choice(list(held))
            try:
                cache.grow(slot, len(held[slot]) + 1)
            except OutOfPages:
                continue
            held[slot].append(chance.randrange(2))
            write(cache, slot, held[slot], len(held[slot]) - 1)
        elif held:
            slot = chance.choice(list(held))
            if chance.random() < 0.7:
                prefixes.store(slot, held[slot])
            if chance.random() < 0.7:
                cache.release(slot)
                del held[slot]
        assert_whole(cache, prefixes, held)
        shared += sum(uses > 1 for uses in cache._uses)
        for slot, tokens in held.items():
            assert read(cache, slot, len(tokens)) == [(token, at) for at, token in enumerate(tokens)]
    assert found > 0 and shared > 0


def held_slot(cache: KVCache, tokens: int) -> int:
    slot = cache.take_slot()
    cache.grow(slot, tokens)
    return slot


def test_the_page_that_was_not_used_for_longest_goes_first():
    cache = small_cache(num_pages=4)
    prefixes = PrefixCache(cache)
    for token in (1, 2, 3):
        slot = held_slot(cache, PAGE)
        prefixes.store(slot, [token] * PAGE)
        cache.release(slot)
    slot = cache.take_slot()
    prefixes.start(slot, prefixes.match([1] * PAGE), PAGE)
    cache.release(slot)
    held_slot(cache, 2 * PAGE)
    assert [len(prefixes.match([token] * PAGE).pages) for token in (1, 2, 3)] == [1, 0, 1]


def test_of_one_sequence_the_last_page_goes_first():
    cache = small_cache(num_pages=3)
    prefixes = PrefixCache(cache)
    slot, tokens = held_slot(cache, 3 * PAGE), list(range(3 * PAGE))
    prefixes.store(slot, tokens)
    cache.release(slot)
    held_slot(cache, PAGE)
    assert len(prefixes.match(tokens).pages) == 2


def test_a_page_that_a_prefix_is_copied_from_may_be_the_one_that_is_taken(monkeypatch):
    monkeypatch.setattr(prefix_cache, "BEGINNING", 2)
    cache = small_cache(num_pages=2)
    prefixes = PrefixCache(cache)
    slot = held_slot(cache, PAGE)
    write(cache, slot, [5, 6, 7, 8])
    prefixes.store(slot, [5, 6, 7, 8])
    cache.release(slot)
    held_slot(cache, PAGE)  # now the page with the content is the only free one
    slot = cache.take_slot()
    assert prefixes.start(slot, prefixes.match([5, 6, 9]), 3) == 2
    assert read(cache, slot, 2) == [(5, 0), (6, 1)]
    assert not prefixes.match([5, 6, 9]).copied, "the page is about to get other content"


def test_growing_beyond_the_budget_changes_nothing():
    cache = small_cache(num_pages=3)
    slot = held_slot(cache, 2 * PAGE)
    with pytest.raises(OutOfPages):
        cache.grow(slot, 4 * PAGE)
    assert (cache.held[slot], cache.num_active) == (2, 2)


@pytest.mark.parametrize("tokens", [2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1])
def test_a_fork_has_a_page_of_its_own_for_its_last_token(tokens):
    """After a failed step the last token is computed again."""
    cache = small_cache()
    source, target = held_slot(cache, tokens), cache.take_slot()
    cache.fork(source, target, tokens)
    *shared, last = cache.pages_of(target)
    assert shared == cache.pages_of(source)[:-1]
    assert last not in cache.pages_of(source)


def test_running_sequences_hold_the_pages_of_a_common_beginning_once(weights):
    engine, collector = make_engine(weights)
    system = "and then again the quick brown fox " * 6
    try:
        (first,) = run(engine, collector, [chat_job("a", system + "0", max_tokens=4, ignore_eos=True)])
        cache = engine.parts.cache
        prompt = cache.pages_for(first.usage.prompt_tokens)
        most = 0
        emit = engine._callback

        def watch(events):
            nonlocal most
            most = max(most, cache.num_active)
            emit(events)

        engine._callback = watch
        jobs = [chat_job(f"b{i}", system + str(i), max_tokens=4, ignore_eos=True) for i in range(8)]
        results = run(engine, collector, jobs)
        assert all(result.usage.cached_tokens > 0 for result in results)
        assert most <= prompt + 2 * 8
    finally:
        engine.close()


def test_a_prompt_that_fits_only_because_of_shared_pages_is_started(weights):
    system = "and then again the quick brown fox " * 40
    engine, collector = make_engine(weights, kv_cache_tokens=20 * 24)
    try:
        with together(engine):
            for name in ("a", "b"):
                engine.submit(chat_job(name, system + name, max_tokens=30, ignore_eos=True))
        results = [collector.result(name) for name in ("a", "b")]
        prompt = engine.parts.cache.pages_for(results[0].usage.prompt_tokens)
        assert 10 < prompt < 18
        assert engine.metrics.max_batch == 2
        assert engine.metrics.preemptions == 0
    finally:
        engine.close()


@pytest.mark.parametrize(("failing", "failed"), [({2}, 0), ({2, 3}, 1)], ids=["once", "again, alone"])
def test_a_failed_copy_leaves_the_cache_whole_and_other_texts_unchanged(
    weights, monkeypatch, failing, failed
):
    jobs = [
        chat_job(f"c{i}", f"{i} fox", temperature=1.0, seed=i, n=3, max_tokens=40, ignore_eos=True)
        for i in range(4)
    ]
    expected, _ = texts(weights, jobs)
    engine, collector = make_engine(weights)
    copy, calls = engine.parts.cache.copy_page, 0

    def fail_at_times(source: int, target: int) -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise torch.OutOfMemoryError("no memory for a page")
        copy(source, target)

    monkeypatch.setattr(engine.parts.cache, "copy_page", fail_at_times)
    try:
        results = run(engine, collector, jobs)
        served = [at for at, result in enumerate(results) if isinstance(result.events[-1], Finished)]
        assert len(served) == len(jobs) - failed
        assert [results[at].text() for at in served] == [expected[at] for at in served]
        prefixes = engine.parts.scheduler._prefixes
        assert prefixes is not None
        assert_whole(engine.parts.cache, prefixes, [])
    finally:
        engine.close()
