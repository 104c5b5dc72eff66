"""LiteLLM's SDK: chats, streams, reasoning, tools, structured output, images, and its own exception
classes."""

import asyncio
import json
from typing import Literal

import httpx
import litellm
import pytest
from litellm.exceptions import MidStreamFallbackError
from pydantic import BaseModel, ConfigDict


class Point(BaseModel):
    """A point on the table, of which there is one."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red"]
    at: Literal[7]


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.fixture
def access(service):
    return {"api_base": service.url, "api_key": service.key, "max_retries": 0}


def asking(text, model="scripted"):
    return {"model": f"openai/{model}", "messages": [{"role": "user", "content": text}]}


def test_completion(access):
    answer = litellm.completion(**asking("Hello!"), **access)
    assert answer.choices[0].message.content == "Hello! How can I help you?"
    assert answer.usage.completion_tokens > 3


def test_stream_and_its_rebuilt_answer(access):
    request = asking("Count to twelve.")
    chunks = list(
        litellm.completion(**request, **access, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 3
    answer = litellm.stream_chunk_builder(chunks, messages=request["messages"])
    assert answer.choices[0].message.content.endswith("eleven, twelve.")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 3


def test_asynchronous_completion(access):
    answer = asyncio.run(litellm.acompletion(**asking("Hello!"), **access))
    assert answer.choices[0].message.content == "Hello! How can I help you?"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(access, stream):
    answer = litellm.completion(**asking("What is 2 + 2?", "thinking"), **access, stream=stream)
    message = (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0].message
    assert (message.content.strip(), message.reasoning_content.strip()) == ("It is 4.", "Two and two.")


def test_tools(access):
    request = asking("What is 3 + 4?")
    message = litellm.completion(**request, **access, tools=[ADD]).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3, "b": 4})
    request["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    answer = litellm.completion(**request, **access, tools=[ADD]).choices[0].message
    assert answer.content == "3 + 4 is 7."


def test_tools_in_a_stream(access):
    request = asking("What are 2 + 2 and 5 + 6?")
    chunks = list(litellm.completion(**request, **access, tools=[ADD], stream=True))
    choice = litellm.stream_chunk_builder(chunks).choices[0]
    calls = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [{"a": 2, "b": 2}, {"a": 5, "b": 6}]
    assert choice.finish_reason == "tool_calls"


def test_structured_output(access):
    answer = litellm.completion(**asking("Where is the ball?"), **access, response_format=Point)
    assert Point.model_validate_json(answer.choices[0].message.content) == Point(colour="red", at=7)


def test_images(access):
    drawn = litellm.image_generation(prompt="a red circle", model="openai/shapes", **access)
    assert httpx.get(drawn.data[0].url).content.startswith(b"\x89PNG")


def test_a_stream_that_breaks_off_raises(access):
    text = ""
    with pytest.raises(MidStreamFallbackError, match="failed on this request"):
        for chunk in litellm.completion(**asking("raise after three tokens", "echo"), **access, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "0 1 2 "


CASES = [
    (litellm.ContextWindowExceededError, asking("word " * 2000), {}),
    (litellm.BadRequestError, asking("Hello!") | {"temperature": 9}, {}),
    (litellm.NotFoundError, asking("Hello!", "gpt-9"), {}),
    (litellm.AuthenticationError, asking("Hello!"), {"api_key": "wrong"}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "request_", "more"), CASES, ids=[kind.__name__ for kind, _, _ in CASES])
def test_refusals_have_their_own_exceptions(access, kind, request_, more, stream):
    with pytest.raises(kind) as caught:
        litellm.completion(**request_, **{**access, **more}, stream=stream)
    assert type(caught.value) is kind


def test_temporary_refusals_have_their_own_exceptions(access, service):
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(**asking("Hello!"), **{**access, "api_base": service.limited_url})
    with pytest.raises(litellm.ServiceUnavailableError):
        litellm.completion(**asking("Hello!", service.absent_model), **access)
