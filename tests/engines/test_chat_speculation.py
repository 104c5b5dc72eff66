"""Speculative decoding by n-gram lookup: fewer steps, the same texts."""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from workers.engines.chat.speculation import NgramIndex


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def jobs(count: int) -> list[Any]:
    """Sampled requests of all kinds, over two tokens alone: drafts are right every other time."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0.7, "n": 2},
        {"temperature": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_tokens": 12, "stop_token_ids": [20]},
    ]
    return [
        chat_job(
            f"s{at}",
            f"{at} fox",
            seed=at,
            max_tokens=20 + at % 17,
            ignore_eos=at % 6 < 5,
            **{"logit_bias": {20: 60.0, 21: 60.0}} | kinds[at % len(kinds)],
        )
        for at in range(count)
    ]


def outcomes(results: list) -> list:
    return [
        [
            (result.text(index), result.finish(index), [delta.logprobs for delta in result.deltas(index)])
            for index in sorted({event.index for event in result.deltas(0) + result.deltas(1)})
        ]
        for result in results
    ]


def flat(outcome: list) -> list:
    """Text, end and the tokens with logprobs of each choice, however they were divided into events."""
    return [
        (text, finish, [token.token for part in logprobs for token in part or []])
        for text, finish, logprobs in outcome
    ]


@pytest.mark.parametrize("kv_cache_tokens", [None, 480], ids=["roomy", "with preemptions"])
def test_drafts_change_no_text(weights: Path, kv_cache_tokens: int | None) -> None:
    """200 seeded requests, one and the same engine loop, with and without drafts."""
    found = []
    for drafts in (0, 6):
        engine, collector = make_engine(
            weights, num_speculative_tokens=drafts, max_batch_size=16, kv_cache_tokens=kv_cache_tokens
        )
        try:
            results = run(engine, collector, jobs(200))
            found.append(
                [(flat(outcome), r.usage) for outcome, r in zip(outcomes(results), results, strict=True)]
            )
        finally:
            engine.close()
    metrics = engine.metrics
    assert metrics.accepted_drafts > 200
    assert (metrics.preemptions > 0) == (kv_cache_tokens is not None)
    without, with_drafts = found
    texts = [[outcome for outcome, _ in each] for each in found]
    assert texts[0] == texts[1]
    assert [(u.prompt_tokens, u.completion_tokens) for _, u in without] == [
        (u.prompt_tokens, u.completion_tokens) for _, u in with_drafts
    ]


def test_a_text_that_repeats_takes_fewer_steps(weights: Path) -> None:
    job = chat_job("a", temperature=0.0, max_tokens=300, ignore_eos=True, logit_bias={20: 90.0})
    steps = []
    for drafts in (0, 8):
        engine, collector = make_engine(weights, num_speculative_tokens=drafts)
        try:
            run(engine, collector, [job])
            steps.append(engine.metrics.decode_steps)
        finally:
            engine.close()
    assert steps[0] == 299
    assert steps[1] < 50


def test_drafts_are_what_followed_the_last_tokens_before() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert index.following(2) == [4, 5]
    assert index.following(9) == [4, 5, 6, 1, 2, 3, 4, 5, 6]
    index.extend([7])
    assert index.following(2) == []
    index.extend([1, 2, 3])
    assert index.following(2) == [7, 1]


def test_drafts_share_a_step_only_while_there_are_rows_for_them(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector = make_engine(weights, num_speculative_tokens=8, max_batch_size=4)
    widest = 0
    forward = engine.parts.runner.forward

    def watched(chunks):
        nonlocal widest
        widest = max(widest, sum(len(chunk.tokens) == 1 for chunk in chunks))
        return forward(chunks)

    monkeypatch.setattr(engine.parts.runner, "forward", watched)
    try:
        run(engine, collector, jobs(24))
        assert engine.metrics.accepted_drafts > 0
        assert widest <= 4
    finally:
        engine.close()
