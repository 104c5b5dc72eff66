"""Reasoning and calls of tools through gunicorn and a worker, as the OpenAI client sees them.

The model is a real one whose answers are written beforehand.
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.deployment import Deployment
from tests.engines import chat_templates as templates
from tests.scripted_chat import save_scripted_model

SCRIPTS = {
    "think": "<think>\nIt's 4.\nSure.\n</think>\n\nThe answer is 4.",
    "long": "<think>" + " ".join(map(str, range(100))) + "</think>never",
}

CATALOGUE = """
project = "Test"
[[models]]
name = "scripted"
tasks = ["chat"]
weights = "{weights}"
workers = [[]]
[models.engine]
torch_threads = 1
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("answers")
    weights = save_scripted_model(folder / "model", templates.QWEN3, SCRIPTS)
    with Deployment(folder, catalogue=CATALOGUE.format(weights=weights)) as service:
        service.start("scripted")
        with openai.OpenAI(
            base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            yield client


def ask(client: openai.OpenAI, script: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": script}]
    return client.chat.completions.create(model="scripted", messages=messages, **fields)


def test_reasoning_is_apart_from_the_content(client):
    answer = ask(client, "think")
    message = answer.choices[0].message
    assert message.content == "The answer is 4."
    assert message.reasoning_content == "It's 4.\nSure."
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_a_stream_has_the_same_reasoning_and_content(client):
    content, reasoning, usages = "", "", []
    for chunk in ask(client, "think", stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            # the reasoning comes first
            assert not content or not getattr(choice.delta, "reasoning_content", None)
    assert (content, reasoning) == ("The answer is 4.", "It's 4.\nSure.")
    assert usages[-1] == ask(client, "think").usage


def test_an_answer_can_end_inside_its_reasoning(client):
    choice = ask(client, "long", max_tokens=20).choices[0]
    assert choice.finish_reason == "length" and choice.message.content == ""
    assert choice.message.reasoning_content.startswith("0 1 2")


def test_reasoning_effort_reaches_the_template(client):
    """The template closes the reasoning itself, so that the answer begins behind it."""
    thinking = ask(client, "think", reasoning_effort="low").usage.prompt_tokens
    quiet = ask(client, "think", reasoning_effort="none").usage.prompt_tokens
    switched = ask(client, "think", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert quiet == switched.usage.prompt_tokens > thinking
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "think", reasoning_effort="huge")
    assert caught.value.param == "reasoning_effort"
