"""Sampling compared with transformers' processors; a seed gives the same text in any batch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.engines.sampling_cases import FILTERS, KINDS, expected_token, masks_of, row, row_of
from tests.engines.tiny_chat import CONFIGS, chat_job, make_engine, run, save_model
from workers.engines.chat.kernels.cpu_sampling import count_bits
from workers.engines.chat.model.uploads import Uploads
from workers.engines.chat.sampling.batch import Batch
from workers.engines.chat.sampling.choose import choose, compiled_choose
from workers.engines.chat.sampling.draw import Filters, _bound
from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sampling.parameters import SlotParameters, seed_states, uniforms
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.sequence import Sequence

VOCABULARY = 300
CPU = torch.device("cpu")


def filters_of(params: list[dict[str, Any]]) -> Filters:
    """The filters of rows that are all drawn."""
    rows = [row(slot, **own) for slot, own in enumerate(params)]
    filters = Batch(rows, list(range(len(rows))), SlotParameters(len(rows)), Uploads(CPU)).filters
    assert filters is not None
    return filters


def reference(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Compute probabilities with transformers' processors, in the order of `generate`."""
    processors = LogitsProcessorList()
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), logits.clone()[None])[0].softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_sampled_tokens_follow_the_distribution_of_transformers(params):
    """A chi-square test, with fixed seeds. A correct sampler fails a case by chance once in 100,000 runs."""
    torch.manual_seed(5)
    logits = torch.randn(VOCABULARY) * 2
    expected = reference(logits, **params)
    draws, rows = 20_000, 500
    sampler = Sampler(VOCABULARY, rows, CPU)
    counts = torch.zeros(VOCABULARY)
    for start in range(0, draws, rows):
        batch = [row(index, seed=start + index, **params) for index in range(rows)]
        sampled = sampler.sample(logits.repeat(rows, 1), batch)
        counts += torch.bincount(torch.tensor(sampled.tokens), minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0, "a token was drawn that transformers filters out"
    often = expected * draws >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = max(len(wanted) - 1, 1)
    # Wilson-Hilferty: the cube root of chi-square / freedom is nearly normal; 4.26 sigmas are one in 100,000
    limit = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


@pytest.mark.parametrize(
    "params", [*FILTERS, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9, "top_k": 3}, {"min_p": 1.0}], ids=str
)
def test_the_compiled_draw_gives_what_torchs_operations_give(params):
    """From flat to peaked rows, half of them with many equal logits."""
    torch.manual_seed(7)
    logits = torch.randn(600, 3000) * torch.logspace(-2, 1.5, 600)[:, None]
    logits[::2] = logits[::2].mul(4).round().div(4)
    logits[:, :5] = -torch.inf
    filters = filters_of([params] * 600)
    uniform = torch.rand(600, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    found = compiled_choose()(logits.clone(), filters, {"uniforms": uniform})
    assert (found >= 5).all()
    assert choose(logits, filters, {"uniforms": uniform}).tolist() == found.tolist()


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_tokens_are_those_of_float64_and_a_sorted_vocabulary(way, monkeypatch):
    """Ten rows of each kind in one batch, for four steps."""
    torch.manual_seed(9)
    rows = [row_of(kind, slot, 1000) for slot, kind in enumerate(list(KINDS) * 10)]
    sampler = Sampler(1000, len(rows), CPU)
    if way == "torch":
        monkeypatch.setattr(sampler, "_choose", choose)
    for _ in range(4):
        logits = (
            torch.randn(len(rows), 1000) * torch.logspace(-1, 1, len(rows))[torch.randperm(len(rows)), None]
        )
        expected = [expected_token(own, one) for own, one in zip(logits, rows, strict=True)]
        tokens = sampler.sample(logits, rows, masks=masks_of(rows, 1000)).tokens
        assert tokens == expected
        for one, token in zip(rows, tokens, strict=True):
            one.append(token)


def test_a_seed_gives_the_tokens_of_earlier_versions():
    steps, vocabulary = 6, 300
    of_earlier_versions: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [160, 103, 167, 205, 8, 36]),
        ({"temperature": 0.7}, [223, 138, 221, 19, 224, 34]),
        ({"top_k": 7}, [1, 238, 121, 253, 51, 290]),
        ({"top_p": 0.8}, [175, 124, 153, 19, 169, 155]),
        ({"min_p": 0.1}, [134, 122, 87, 222, 222, 169]),
        ({"temperature": 1.3, "top_k": 200, "top_p": 0.95, "min_p": 0.01}, [123, 31, 270, 185, 257, 48]),
        ({"repetition_penalty": 1.5, "top_p": 0.9}, [1, 259, 211, 190, 148, 200]),
        ({"presence_penalty": 1.0, "frequency_penalty": 0.5}, [160, 257, 48, 2, 179, 290]),
        ({"logit_bias": ((9, 5.0), (20, -100.0)), "top_k": 50}, [167, 254, 189, 257, 288, 33]),
        (
            {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": frozenset([1, 2])},
            [86, 238, 289, 118, 51, 34],
        ),
    ]
    rows = [row(at, (5, 6, 7), seed=at + 40, **own) for at, (own, _) in enumerate(of_earlier_versions)]
    for one in rows:
        one.index %= 3
    sampler, places = Sampler(vocabulary, len(rows), CPU), np.arange(vocabulary)
    for step in range(steps):
        logits = 3 * np.sin(places * (1.7 + step)) + np.cos(places * 0.37)
        tokens = sampler.sample(torch.from_numpy(logits).float().repeat(len(rows), 1), rows).tokens
        for one, token in zip(rows, tokens, strict=True):
            one.append(token)
    assert [one.output for one in rows] == [tokens for _, tokens in of_earlier_versions]


def test_each_row_is_drawn_by_its_own_filters():
    torch.manual_seed(8)
    logits = torch.randn(len(FILTERS), 500)
    uniform = torch.rand(len(FILTERS), dtype=torch.float64)
    together = compiled_choose()(logits.clone(), filters_of(FILTERS), {"uniforms": uniform})
    alone = [
        compiled_choose()(logits[at : at + 1].clone(), filters_of([own]), {"uniforms": uniform[at : at + 1]})
        for at, own in enumerate(FILTERS)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


def test_rounding_never_draws_a_token_without_weight():
    torch.manual_seed(11)
    logits = torch.randn(4000, 128) * 4
    logits[:, 100:] = -torch.inf
    uniform = torch.full((len(logits),), 1 - 2**-24, dtype=torch.float64)
    for way in (choose, compiled_choose()):
        assert (way(logits.clone(), filters_of([{}] * len(logits)), {"uniforms": uniform}) < 100).all()


def test_a_goal_that_rounding_puts_out_of_reach_keeps_everything():
    weights = torch.rand(3, 500)
    bound, reached = _bound(weights, weights.double().sum(-1, keepdim=True) * (1 + 1e-7), counted=False)
    assert bound.tolist() == [[0.0]] * 3
    torch.testing.assert_close(reached, weights.double().sum(-1, keepdim=True))


@pytest.mark.parametrize("allowed", [300, 250, 3, 1], ids="{} allowed".format)
@pytest.mark.parametrize("params", [{"temperature": 0.0}, *FILTERS], ids=str)
def test_logits_that_are_no_numbers_give_some_token(params, allowed):
    """On a GPU an index outside of a tensor would end the process, and with it all requests."""
    logits = torch.randn(4, 300)
    logits[0] = torch.nan
    logits[1, 5] = -torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    bits = np.packbits(np.arange(320) < allowed, bitorder="little").view(np.int32)
    sent: dict[str, torch.Tensor] = {}
    if allowed < 300:
        sent = {"masked": torch.arange(4), "allowed": torch.from_numpy(np.tile(bits, (4, 1)))}
    filters = None if params.get("temperature") == 0 else filters_of([params] * 4)
    if filters is not None:
        sent["uniforms"] = torch.full((4,), 1 - 2**-24, dtype=torch.float64)
    for way in (choose, compiled_choose()):
        tokens = way(logits.clone(), filters, sent)
        assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_a_mask_allows_one_token_or_some_or_all(way):
    """Also at the size at which compiled loops begin to gather tokens, and with bits behind the last one."""
    torch.manual_seed(12)
    vocabulary, sizes = 1000, (1, 2, 31, 124, 125, 126, 127, 500, 999, 1000)
    logits = torch.randn(len(sizes), vocabulary)
    orders = [torch.randperm(vocabulary) for _ in sizes]
    bits = np.zeros((len(sizes), 1024), np.bool_)
    bits[:, vocabulary:] = True
    for own, order, size in zip(bits, orders, sizes, strict=True):
        own[order[:size].numpy()] = True
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    sent = {"masked": torch.arange(len(sizes)), "allowed": torch.from_numpy(words)}
    excluded = logits.masked_fill(~torch.from_numpy(bits[:, :vocabulary]), -torch.inf)
    own_way = compiled_choose() if way == "compiled" else choose
    assert own_way(logits.clone(), None, sent).tolist() == excluded.argmax(-1).tolist()
    filters = filters_of([{}] * len(sizes))
    for point in (0.0, 0.3, 1 - 2**-24):
        sent["uniforms"] = torch.full((len(sizes),), point, dtype=torch.float64)
        cumulative = excluded.double().softmax(-1).cumsum(-1)
        expected = torch.searchsorted(cumulative, point * cumulative[:, -1:], right=True)[:, 0]
        assert own_way(logits.clone(), filters, sent).tolist() == expected.tolist()


def test_a_mask_that_allows_nothing_still_gives_a_token():
    """Whose grammar then refuses it: an arbitrary number would fail in the next step, for all rows."""
    torch.manual_seed(13)
    logits = torch.randn(2, 1000)
    words = np.zeros((2, 32), np.int32)
    words[1, 31] = -256  # bits behind the last token alone
    sent = {"masked": torch.arange(2), "allowed": torch.from_numpy(words)}
    assert compiled_choose()(logits.clone(), None, sent).tolist() == [0, 0]
    sent["uniforms"] = torch.full((2,), 0.5, dtype=torch.float64)
    assert compiled_choose()(logits.clone(), filters_of([{}] * 2), sent).tolist() == [0, 0]


def test_uniform_numbers_look_uniform_and_independent():
    seeds = list(range(400))
    rows = [uniforms(seed_states(seeds, [choice] * 400), [7] * 400) for choice in range(20)]
    draws = torch.from_numpy(np.stack(rows))
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=0.005)
    assert float(torch.corrcoef(draws).fill_diagonal_(0).abs().max()) < 0.25


def test_a_seed_means_the_same_in_every_version():
    """24 bits of SplitMix64 over seed, choice and position. Seeds are taken modulo 2^64."""
    draws = uniforms(seed_states([0, 5, -1, 2**64 - 1, 2**63], [0, 2, 1, 1, 0]), [0, 7, 3, 3, 2000])
    assert (draws * 2**24).tolist() == [2327157, 8820271, 13484191, 13484191, 3444058]


def test_a_temperature_near_zero_is_greedy():
    torch.manual_seed(3)
    logits = torch.randn(1, VOCABULARY)
    best = int(logits.argmax())
    for temperature in (0.0, 1e-50, 1e-6, 1e-5):
        chosen = Sampler(VOCABULARY, 1, CPU).sample(logits.clone(), [row(0, temperature=temperature)])
        assert chosen.tokens == [best], temperature


def test_each_row_obeys_its_own_parameters():
    torch.manual_seed(2)
    logits = torch.randn(5, VOCABULARY)
    rows = [
        row(0, temperature=0.0),
        row(1, seed=1, top_k=1),
        row(2, temperature=0.0, logit_bias=((9, 100.0),)),
        row(3, temperature=0.0, min_tokens=3, stop_token_ids=frozenset({int(logits[3].argmax())})),
        row(4, temperature=0.0, logprobs=2),
    ]
    best = logits.topk(2).indices
    sampled = Sampler(VOCABULARY, 5, CPU).sample(logits.clone(), rows)
    assert sampled.tokens == [best[0, 0], best[1, 0], 9, best[3, 1], best[4, 0]]
    assert list(sampled.logprobs) == [4]
    assert [token for token, _ in sampled.logprobs[4].top] == best[4].tolist()
    assert sampled.logprobs[4].own == pytest.approx(float(logits[4].log_softmax(-1).max()))


@pytest.mark.parametrize("params", [*FILTERS, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_rows_that_are_no_tokens_are_never_chosen(params, way, monkeypatch):
    torch.manual_seed(6)
    logits = torch.randn(200, VOCABULARY)
    logits[:, 290:] += 30
    sampler = Sampler(VOCABULARY, 200, CPU, 290)
    if way == "torch":
        monkeypatch.setattr(sampler, "_choose", choose)
    sampled = sampler.sample(logits, [row(index, seed=index, logprobs=20, **params) for index in range(200)])
    assert max(sampled.tokens) < 290
    assert all(max(logprobs.top)[0] < 290 for logprobs in sampled.logprobs.values())


def test_penalties_are_those_of_transformers_and_openai():
    torch.manual_seed(3)
    logits = torch.randn(VOCABULARY)
    prompt, output = (5, 6, 7), (8, 8, 9)
    sampler = Sampler(VOCABULARY, 2, CPU)
    sequence = row(
        0,
        prompt,
        output,
        temperature=0.0,
        repetition_penalty=1.5,
        frequency_penalty=0.3,
        presence_penalty=0.2,
    )
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + output]), logits.clone()[None])[0]
    expected[8] -= 0.2 + 2 * 0.3
    expected[9] -= 0.2 + 0.3

    def penalised(sequence: Sequence) -> torch.Tensor:
        """What the sampler makes of the logits before it takes the best."""
        changed = logits[None].clone()
        sampler.sample(changed, [sequence])
        return changed[0]

    torch.testing.assert_close(penalised(sequence), expected)
    # and after another token, counted one at a time
    sequence.append(9)
    expected[9] -= 0.3
    torch.testing.assert_close(penalised(sequence), expected)
    # and in another slot, where its output is counted again
    sequence.slot = 1
    sequence.append(9)
    expected[9] -= 0.3
    torch.testing.assert_close(penalised(sequence), expected)
    # another sequence in the slot starts without counts
    other = row(1, (1,), (), temperature=0.0, presence_penalty=1.0)
    torch.testing.assert_close(penalised(other), logits)
    # and so does the first one, back in the slot that it left
    sequence.slot = 0
    torch.testing.assert_close(penalised(sequence), expected)


def test_a_mask_restricts_the_next_token():
    torch.manual_seed(4)
    logits = torch.randn(3, VOCABULARY)
    rows = [row(0, temperature=0.0), row(1, seed=3), row(2, temperature=0.0)]
    # words of the bitmask that allow nothing or everything, and a last one of which 12 bits count
    allowed = np.zeros((2, -(-VOCABULARY // 32)), np.int32)
    allowed[0, 1] = allowed[1, -1] = -1
    masks = Masks(np.array([1, 2]), allowed)
    tokens = Sampler(VOCABULARY, 3, CPU).sample(logits.clone(), rows, masks=masks).tokens
    assert tokens[0] == logits[0].argmax()
    assert 32 <= tokens[1] < 64
    assert tokens[2] == 288 + logits[2, 288:].argmax()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def tokens_of(engine, collector, jobs) -> dict[str, list[list[int]]]:
    """Run the jobs. Returns the tokens of each job's choices."""
    requests = {}
    close = engine.parts.outputs._close

    def keep(request, event):
        requests[request.id] = request
        close(request, event)

    engine.parts.outputs._close = keep
    run(engine, collector, jobs)
    engine.parts.outputs._close = close
    return {job.id: [sequence.output for sequence in requests[job.id].sequences] for job in jobs}


def margin(engine, model, job, choice: int, tokens: list[int], other: list[int]) -> float:
    """Find where two outputs differ. Returns the distance of that draw from the nearest threshold."""
    place = next(at for at, (one, two) in enumerate(zip(tokens, other, strict=True)) if one != two)
    prompt = engine.parts.prompts.build(job).prompt
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens[:place]])).logits[0, -1].double()
    logits[len(engine.parts.prompts.vocabulary.pieces) :] = -torch.inf
    names = ("temperature", "top_k", "top_p", "min_p")
    params = {name: value for name in names if (value := getattr(job.sampling, name)) is not None}
    cumulative = reference(logits, **params).cumsum(-1)
    point = float(uniforms(seed_states([job.sampling.seed], [choice]), [place])[0])
    return float((cumulative - point).abs().min())


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(weights):
    """One text of 290 may differ, where a draw comes within 1e-4 of the threshold between two tokens."""
    mixture = [
        *FILTERS,
        {"repetition_penalty": 1.2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"n": 3},
    ]
    jobs = [
        chat_job(
            f"s{i}",
            f"{i} fox",
            **{"temperature": 1.0, **params},
            seed=i,
            max_tokens=25,
            ignore_eos=True,
        )
        for i, params in enumerate(mixture)
    ]
    engine, collector = make_engine(weights, prefix_cache=False)
    try:
        together = tokens_of(engine, collector, jobs)
        assert engine.metrics.max_batch >= 10
    finally:
        engine.close()
    engine, collector = make_engine(weights, max_batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    ties = 0
    try:
        for job in jobs:
            alone = tokens_of(engine, collector, [job])[job.id]
            for choice, (one, two) in enumerate(zip(alone, together[job.id], strict=True)):
                if one != two:
                    ties += 1
                    assert margin(engine, model, job, choice, one, two) < 1e-4
    finally:
        engine.close()
    assert ties <= 1


def test_without_a_seed_answers_differ(weights):
    engine, collector = make_engine(weights)
    try:
        jobs = [chat_job(f"u{i}", temperature=1.5, max_tokens=20, ignore_eos=True) for i in range(3)]
        assert len({result.text() for result in run(engine, collector, jobs)}) == 3
    finally:
        engine.close()


def test_bits_are_counted_in_rows_of_any_length() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, (3, 37), np.uint32)
    words[0] = 0xFFFFFFFF
    counts = np.full(3, -1)
    count_bits(words, counts)
    assert counts.tolist() == [
        32 * 37,
        *(sum(word.bit_count() for word in row.tolist()) for row in words[1:]),
    ]
