"""app.embeddings.schema: what a request may hold, and the job that it becomes."""

from typing import Any

import pytest

from app.embeddings import schema
from app.embeddings.schema import MAX_CHARACTERS, MAX_INPUTS, EmbeddingRequest
from app.http.validation import parse
from catalogue import EmbeddingDefaults, EmbeddingModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import EmbeddingJob, decode, encode, work_of

ENTRY = EmbeddingModelEntry(name="m", tasks=("embedding",), weights="w")


def job_of(entry: EmbeddingModelEntry = ENTRY, **fields: Any) -> EmbeddingJob:
    return parse(EmbeddingRequest, {"model": "m", **fields}).to_job("id", entry)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a text", ["a text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["x" * 5] * MAX_INPUTS, ["x" * 5] * MAX_INPUTS),
    ],
    ids=["text", "texts", "tokens", "token lists", "many"],
)
def test_input_has_four_forms(given: Any, inputs: list[Any]) -> None:
    job = job_of(input=given, encoding_format="base64", user="u")
    assert job == EmbeddingJob(id="id", model="m", inputs=inputs)
    assert decode(*encode(job)) == job


@pytest.mark.parametrize(
    ("given", "message", "param"),
    [
        (None, "input must be", "input"),
        (3, "input must be", "input"),
        ({}, "input must be", "input"),
        ("", "input must have at least 1 characters", "input"),
        ([], "input must have at least 1 items", "input"),
        (["a", ""], "input.1 must have at least 1 characters", "input.1"),
        ([[]], "input.0 must have at least 1 items", "input.0"),
        ([1, -2], "input.1 must be at least 0", "input.1"),
        ([1, 2**31], "input.1 must be less than 2147483648", "input.1"),
        ([1, 1.5], "input.1", "input.1"),
        ([True], "input.0 must be a whole number, not true", "input.0"),
        (["a", 1], "input.1 must be a string", "input.1"),
        ([[1], "a"], "input.1 must be a list", "input.1"),
        ("a\0b", "input: must not contain the character NUL", "input"),
        (["a", "\0"], "input.1: must not contain the character NUL", "input.1"),
        ("x" * (MAX_CHARACTERS + 1), "input must have at most 1048576 characters", "input"),
        (["x"] * (MAX_INPUTS + 1), "input must have at most 2048 items", "input"),
        ([[1]] * (MAX_INPUTS + 1), "input must have at most 2048 items", "input"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_inputs_are_refused_by_name(given: Any, message: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job_of(input=given)
    assert message in caught.value.message and caught.value.param == param


def test_all_lists_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MAX_TOKENS", 10)
    job_of(input=[[1] * 5] * 2)
    with pytest.raises(InvalidRequest, match="at most 10 tokens in all lists together"):
        job_of(input=[[1] * 6] * 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoding_format", "int8"),
        ("dimensions", 0),
        ("dimensions", True),
        ("dimensions", "8"),
        ("truncate_prompt_tokens", -2),
        ("user", 3),
        ("model", ""),
    ],
)
def test_other_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job_of(**{"input": "a", field: value})
    assert caught.value.param == field


def test_the_catalogue_may_truncate_what_a_request_does_not() -> None:
    entry = ENTRY.model_copy(update={"defaults": EmbeddingDefaults(truncate_prompt_tokens=-1)})
    assert job_of(entry, input="a").truncate_prompt_tokens == -1
    assert job_of(entry, input="a", truncate_prompt_tokens=7).truncate_prompt_tokens == 7
    assert job_of(input="a", dimensions=8).truncate_prompt_tokens is None


def test_the_work_of_a_job_is_its_tokens() -> None:
    assert work_of(job_of(input=["x" * 40, "y" * 8])) == 12
    assert work_of(job_of(input=[[1] * 12])) == 12
