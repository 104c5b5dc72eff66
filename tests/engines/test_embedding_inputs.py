"""Tokenizing: limits, truncation, and long texts of which only the beginning is looked at."""

from typing import Any

import pytest

from protocol.errors import Cancelled, ContextLengthExceeded, InvalidRequest
from tests.engines.tiny_embedding import SPECIAL, WORDS, job, make_tokenizer
from workers.engines.embedding import inputs
from workers.engines.embedding.inputs import InputEncoder

LIMIT = 16


def encoder(**settings: Any) -> InputEncoder:
    options = {"lower_case": False, **settings}
    return InputEncoder(make_tokenizer(), len(SPECIAL + WORDS), LIMIT, **options)


def test_texts_and_tokens_are_encoded_in_order() -> None:
    found = encoder().encode(job("r", *["the cat", "a"] * 50))
    assert found == [make_tokenizer()(text)["input_ids"] for text in ["the cat", "a"] * 50]
    assert encoder().encode(job("r", [4, 5], [6])) == [[4, 5], [6]]


def test_texts_are_converted_to_lower_case_if_the_model_says_so() -> None:
    assert encoder().encode(job("r", "The CAT")) != encoder().encode(job("r", "the cat"))
    assert encoder(lower_case=True).encode(job("r", "The CAT")) == encoder().encode(job("r", "the cat"))


@pytest.mark.parametrize(
    ("given", "tokens", "param"),
    [
        (["a " * 15], "the input has 17 tokens", "input"),
        ([[4] * 17], "the input has 17 tokens", "input"),
        (["a", "a " * 15], "input 1 has 17 tokens", "input.1"),
        (["a", "a " * 100_000], "input 1 has at least 1154 tokens", "input.1"),
    ],
)
def test_a_long_input_is_refused_with_the_limit(given: list[Any], tokens: str, param: str) -> None:
    with pytest.raises(
        ContextLengthExceeded, match=f"maximum context length is 16 tokens. However, {tokens}"
    ) as caught:
        encoder().encode(job("r", *given))
    assert caught.value.param == param


def test_an_input_of_the_limit_is_served() -> None:
    (found,) = encoder().encode(job("r", "a " * 14))
    assert len(found) == LIMIT


@pytest.mark.parametrize("text", ["a b c d e f g h " * 4, "a b c d e f g h " * 50_000], ids=["short", "long"])
@pytest.mark.parametrize("wanted", [-1, 16, 5, 3])
def test_truncation_is_that_of_transformers(text: str, wanted: int) -> None:
    limit = LIMIT if wanted == -1 else wanted
    (found,) = encoder().encode(job("r", text, truncate_prompt_tokens=wanted))
    assert found == make_tokenizer()(text, truncation=True, max_length=limit)["input_ids"]
    assert encoder().encode(job("r", [4] * 40, truncate_prompt_tokens=wanted)) == [[4] * limit]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(17, "must be at most 16, this model's limit"), (2, "must be at least 3"), (0, "must be at least 3")],
)
def test_a_truncation_that_can_not_be_is_refused(wanted: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"truncate_prompt_tokens {message}") as caught:
        encoder().encode(job("r", "a b c d", truncate_prompt_tokens=wanted))
    assert caught.value.param == "truncate_prompt_tokens"


def test_of_a_long_text_only_the_beginning_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tokenize = InputEncoder._tokenize

    def count(self: InputEncoder, texts: list[str]) -> list[list[int]]:
        seen.extend(map(len, texts))
        return tokenize(self, texts)

    monkeypatch.setattr(InputEncoder, "_tokenize", count)
    with pytest.raises(ContextLengthExceeded):
        encoder().encode(job("r", "cat " * 250_000))
    assert sum(seen) < 20_000


def test_a_text_that_is_mostly_dropped_is_no_long_input() -> None:
    assert encoder().encode(
        job("r", " " * 500_000 + "cat" + "\u200b" * 10 + " " * 500_000)
    ) == encoder().encode(job("r", "cat\u200b"))


def test_a_token_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"input 1 contains token 400; the model's tokens are 0 to \d+$"
    ) as caught:
        encoder().encode(job("r", [4], [4, 400]))
    assert caught.value.param == "input.1"


def test_the_tokens_of_all_inputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_REQUEST_TOKENS", 100)
    assert len(encoder().encode(job("r", *[[4] * 10] * 10))) == 10
    with pytest.raises(InvalidRequest, match="may have 100 tokens in all inputs together") as caught:
        encoder().encode(job("r", *[[4] * 10] * 11))
    assert caught.value.param == "input"


def test_encoding_stops_when_the_job_is_cancelled() -> None:
    asked = iter([False, False, True])
    with pytest.raises(Cancelled):
        encoder().encode(job("r", *["a"] * 1000), lambda: next(asked))
