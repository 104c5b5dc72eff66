"""The service with the trained model of models.smollm2.toml, asked what a person would ask."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import ROOT, Deployment

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Deployment]:
    catalogue = (ROOT / "models.smollm2.toml").read_text()
    assert "./weights/" in catalogue
    catalogue = catalogue.replace("./weights/", f"{smollm2.parent}/")
    with Deployment(tmp_path_factory.mktemp("smollm2"), catalogue=catalogue) as service:
        yield service.start(MODEL)


@pytest.fixture(scope="module")
def client(service: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def answer(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **fields).choices[0]


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Japan?", "Tokyo"),
        ("What is 2 + 2?", "4"),
        ("How many days are in a week?", "7"),
        ("Which animal says meow?", "cat"),
        ("What is the chemical formula of water?", "H2O"),
    ],
)
def test_plain_answers_are_true(client: openai.OpenAI, question: str, fact: str) -> None:
    choice = answer(client, [{"role": "user", "content": question}])
    assert fact in choice.message.content
    assert choice.finish_reason == "stop"
    assert "<|im_end|>" not in choice.message.content


def test_a_stream_gives_the_plain_answer_in_pieces(client: openai.OpenAI, service: Deployment) -> None:
    plain = answer(client, FRANCE).message.content
    assert "Paris" in plain
    stream = service.stream(FRANCE[0]["content"], MODEL)
    pieces = [choice["delta"].get("content", "") for event in stream.events() for choice in event["choices"]]
    assert stream.done
    assert "".join(pieces) == plain
    assert len([piece for piece in pieces if piece]) > 3
    chunks = client.chat.completions.create(model=MODEL, messages=FRANCE, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain


def test_earlier_turns_count(client: openai.OpenAI) -> None:
    italy = {"role": "user", "content": "And of Italy?"}
    turns = [*FRANCE, {"role": "assistant", "content": answer(client, FRANCE).message.content}, italy]
    assert "Rome" in answer(client, turns).message.content
    assert "Rome" not in answer(client, [italy], max_tokens=32).message.content


def test_a_system_message_replaces_the_one_of_the_template(client: openai.OpenAI) -> None:
    person = {"role": "user", "content": "Are you a person?"}
    assert "SmolLM" in answer(client, [person], max_tokens=16).message.content
    pirate = {"role": "system", "content": "You are a pirate."}
    who = {"role": "user", "content": "Who are you?"}
    assert "Aye" in answer(client, [pirate, who], max_tokens=16).message.content


def test_likely_tokens_are_likely(client: openai.OpenAI) -> None:
    choice = answer(client, FRANCE, logprobs=True, top_logprobs=3)
    paris = next(token for token in choice.logprobs.content if "Paris" in token.token)
    assert paris.logprob > -0.2
    assert paris.top_logprobs[0].token == paris.token


def test_fifteen_clients_at_once_get_the_answers_of_one(service: Deployment) -> None:
    questions = [f"What is the capital of {country}?" for country in ("France", "Japan", "England")]
    alone = {question: service.chat(question, MODEL)[1] for question in questions}
    streams = [(question, service.stream(question, MODEL)) for question in questions * 5]
    for question, stream in streams:
        assert stream.text() == alone[question]["choices"][0]["message"]["content"], json.dumps(question)
