"""Masks that aren't filled before the logits are known: the answers are those of filled masks."""

import json
import random
from collections.abc import Sequence as ListOf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from protocol.jobs import ChatJob, OutputFormat
from tests.engines.test_chat_structured import SCHEMAS, closing, format_job, schema_job
from tests.engines.tiny_chat import CONFIGS, VOCABULARY, make_engine, run, save_model
from tests.engines.tiny_sentencepiece import save_sentencepiece_model, train
from workers.engines.chat.grammar.compiler import GrammarCompiler
from workers.engines.chat.grammar.filler import MOST_LATE, LateRows, MaskThreads, PendingMasks
from workers.engines.chat.grammar.reasoning import Reasoning
from workers.engines.chat.sampling.choose import choose, compiled_choose
from workers.engines.chat.sequence import Sampling

FORMATS: list[tuple[Any, str]] = [
    ("regex", "(the|lazy|dog)( [a-z]{2,5})*"),
    ("choice", '["the quick", "the lazy", "brown fox"]'),
    ("grammar", 'start: /[a-z]+/ (", " /[a-z]{1,9}/)*'),
    ("grammar", 'start: "<b>" inner "</b>"\ninner: start | /[0-9]*/'),
    *(("json_schema", json.dumps(schema)) for schema in SCHEMAS.values()),
]
ENDS = frozenset([0, 1])
"""Of the tokenizers' special tokens."""
REASONING = Reasoning("<|user|>", "<|assistant|>", opened=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def compiler(
    request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> GrammarCompiler:
    if request.param == "sentencepiece":
        weights = save_sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"), train("bpe"))
    tokenizer = AutoTokenizer.from_pretrained(weights)
    return GrammarCompiler(tokenizer, VOCABULARY, ENDS)


def tokens_of(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def test_what_a_mask_would_allow_is_known_without_it(compiler: GrammarCompiler) -> None:
    draw = random.Random(1)
    words = np.empty(compiler.words, np.int32)
    free = forced = 0
    for kind, text in FORMATS:
        wanted = OutputFormat(kind=kind, text=text, param="guided")
        for reasoning in (None, REASONING):
            own = compiler.compile(wanted, "tiny", reasoning)
            for _ in range(25):
                before = own.copy()
                told = [own.allows(token) for token in range(32 * compiler.words)]
                one = own.forced()
                before.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                allowed = tokens_of(words)
                others = [token for token in allowed if token not in ENDS]
                if one is not None:
                    forced += 1
                    assert allowed == [one] and told[one], (kind, text)
                else:
                    free += 1
                    assert [at for at, fits in enumerate(told) if fits] == others, (kind, text)
                assert all(told[token] is None for token in ENDS)
                if own.accept(draw.choice(allowed)):
                    break
    assert min(free, forced) > 100


def jobs(bias: dict[int, float]) -> list[ChatJob]:
    """Greedy ones of all formats and with all options, and others beside them."""
    options: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"min_tokens": 30, "ignore_eos": True},
        {"stop_token_ids": [5, 9, 40], "min_tokens": 20},
        {"n": 2},
        {"temperature": 0.9, "seed": 1},
    ]
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 50, "logit_bias": bias}
    found = [
        format_job(f"{at} {kind}", kind, text, **{**common, **options[at % len(options)]})
        for at, (kind, text) in enumerate(FORMATS)
    ]
    text = {"type": "string", "maxLength": 40}
    return [*found, *(schema_job(f"text {at}", text, **{**common, **own}) for at, own in enumerate(options))]


def test_answers_do_not_depend_on_when_masks_are_filled(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    filled: list[int] = []
    best, fill_late, fill = LateRows.best, LateRows.fill, PendingMasks.fill

    def noted_best(late: LateRows, mask: int, logits: np.ndarray) -> int | None:
        token = best(late, mask, logits)
        found.append(token is not None)
        return token

    def noted_fill(late: LateRows, masks: ListOf[int], allowed: np.ndarray) -> None:
        filled.extend(masks)
        fill_late(late, masks, allowed)

    def fill_none(pending: PendingMasks, *, late: bool) -> Any:
        pending._stopped.set()
        return fill(pending, late=late)

    monkeypatch.setattr(LateRows, "best", noted_best)
    monkeypatch.setattr(LateRows, "fill", noted_fill)
    engine, collector = make_engine(weights, max_batch_size=32)
    try:
        wanted = jobs(closing(engine))
        answers = []
        for late in (False, True):
            monkeypatch.setattr(PendingMasks, "fill", fill_none if late else fill)
            engine.parts.masks._late = late
            results = run(engine, collector, wanted)
            answers.append(
                [
                    (result.finish(index), [(d.text, d.tokens, d.logprobs) for d in result.deltas(index)])
                    for result, job in zip(results, wanted, strict=True)
                    for index in range(job.sampling.n)
                ]
            )
            collector.events.clear()
            assert bool(found) == bool(filled) == late
    finally:
        engine.close()
    assert answers[0] == answers[1]
    assert found.count(False) == len(filled) > 100
    assert found.count(True) > 100


class Row:
    """What PendingMasks needs of a sequence."""

    def __init__(self, temperature: float, late: int = 0) -> None:
        self.sampling = Sampling(max_tokens=1, temperature=temperature)
        self.output = [1]
        self.grammar = AnyToken(late)


class AnyToken:
    """A grammar that allows each token."""

    ends: frozenset[int] = frozenset()

    def __init__(self, late: int) -> None:
        self.late = late

    def allows(self, token: int) -> bool:
        return True

    def forced(self) -> None:
        return None


def test_filling_ends_with_the_forward_pass() -> None:
    """Rows that are drawn need their masks; of the others, those that threads have begun are waited for."""
    rows: list[Any] = [Row(at % 2, late=at // 6) for at in range(12)]
    calls: list[list[int]] = []

    class Threads(MaskThreads):
        def fill(self, rows: dict[int, Any], bits: np.ndarray) -> None:
            calls.append(list(rows))
            if len(calls) == 3:
                pending.stop()

    bits = np.zeros((12, 1), np.int32)
    pending = PendingMasks(rows, bits, Threads(2))
    assert pending.fill(late=True) == {rows[2], rows[4]}
    assert calls == [[1, 3, 5, 7, 9, 11], [6, 8], [10, 0]], "the one that was late most often is first"
    calls.clear()
    assert pending.fill(late=False) == set()
    assert calls == [list(range(12))]


def test_a_row_is_not_without_a_mask_for_long() -> None:
    row: Any = Row(0)
    late = LateRows({3: row}, MaskThreads(1))
    logits = np.array([0.5, 2, 1], np.float32)
    assert [late.best(3, logits) for _ in range(MOST_LATE + 1)] == [1] * MOST_LATE + [None]


def test_logits_that_are_no_numbers_are_left_to_the_mask() -> None:
    row: Any = Row(0)
    late = LateRows({0: row}, MaskThreads(1))
    for number in (np.nan, np.inf, -np.inf):
        assert late.best(0, np.full(4, number, np.float32)) is None


def test_late_masks_give_the_best_token_that_they_allow() -> None:
    torch.manual_seed(14)
    vocabulary, rows = 1000, 60
    logits = torch.randn(rows, vocabulary)
    bits = np.zeros((rows, 1024), np.bool_)
    for at in range(rows):
        # most of the tokens, half of them, or few
        bits[at, torch.randperm(vocabulary)[: (900, 500, 3)[at % 3]].numpy()] = True
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    expected = choose(
        logits.clone(), None, {"masked": torch.arange(rows), "allowed": torch.from_numpy(words)}
    )
    filled: list[int] = []

    class Late:
        def __contains__(self, mask: object) -> bool:
            return mask in range(0, rows, 2)

        def best(self, mask: int, logits: np.ndarray) -> int | None:
            token = int(logits.argmax())
            return token if bits[mask, token] else None

        def fill(self, masks: ListOf[int], allowed: np.ndarray) -> None:
            filled.extend(masks)
            allowed[masks] = words[masks]

    unfilled = words.copy()
    unfilled[::2] = -1
    sent = {"masked": torch.arange(rows), "allowed": torch.from_numpy(unfilled)}
    tokens = compiled_choose()(logits.clone(), None, sent, Late())
    assert tokens.tolist() == expected.tolist()
    refused = [at for at in range(0, rows, 2) if not bits[at, int(logits[at].argmax())]]
    assert filled == refused and 0 < len(refused) < rows // 2
