"""LangChain's ChatOpenAI: chats, streams, bound tools, structured output in each of its methods, errors."""

import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, SecretStr


class Point(BaseModel):
    """A point on the table, of which there is one."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red"]
    at: Literal[7]


POINT = Point(colour="red", at=7)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def chat(service, model="scripted", **options) -> ChatOpenAI:
    given = {"base_url": service.url, "api_key": SecretStr(service.key), "max_retries": 0, **options}
    return ChatOpenAI(model=model, **given)


def test_invoke(service):
    answer = chat(service).invoke("Hello!")
    assert answer.content == "Hello! How can I help you?"
    assert answer.usage_metadata["output_tokens"] > 3
    assert answer.response_metadata["finish_reason"] == "stop"


def test_batch(service):
    answers = chat(service).batch(["Hello!", "Count to twelve.", "7"])
    assert [answer.content.split()[0] for answer in answers] == ["Hello!", "One,", "3"]


def test_stream(service):
    chunks = list(chat(service, stream_usage=True).stream("Count to twelve."))
    assert len(chunks) > 3
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content.endswith("eleven, twelve.")
    assert whole.usage_metadata["output_tokens"] > 3


def test_asynchronous_stream(service):
    async def read() -> str:
        return "".join([chunk.content async for chunk in chat(service).astream("Count to twelve.")])

    assert asyncio.run(read()).endswith("eleven, twelve.")


def test_reasoning_is_kept_out_of_the_content(service):
    answer = chat(service, "thinking").invoke("What is 2 + 2?")
    assert answer.content.strip() == "It is 4."
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    assert "Two and two" not in str(answer), "docs/api.md says that it drops reasoning"


def test_bound_tools_and_their_results(service):
    model = chat(service).bind_tools([add])
    messages = [HumanMessage("What is 3 + 4?")]
    answer = model.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 3, "b": 4})
    messages += [answer, add.invoke(call)]
    assert isinstance(messages[-1], ToolMessage)
    assert model.invoke(messages).content == "3 + 4 is 7."


def test_bound_tools_in_a_stream(service):
    whole = AIMessageChunk("")
    for chunk in chat(service).bind_tools([add]).stream("What are 2 + 2 and 5 + 6?"):
        whole += chunk
    assert [call["args"] for call in whole.tool_calls] == [{"a": 2, "b": 2}, {"a": 5, "b": 6}]
    assert whole.content.strip() == "I add twice."


def test_an_invalid_call_is_text(service):
    answer = chat(service).bind_tools([add]).invoke("Break a call.")
    assert not answer.tool_calls and not answer.invalid_tool_calls
    assert "add" in answer.content


@pytest.mark.parametrize("choice", ["required", "any", "Point"])
def test_a_call_can_be_demanded(service, choice):
    (call,) = chat(service).bind_tools([Point], tool_choice=choice).invoke("Point at the ball.").tool_calls
    assert (call["name"], call["args"]) == ("Point", POINT.model_dump())


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(service, method, strict):
    model = chat(service).with_structured_output(Point, method=method, strict=strict)
    assert model.invoke("Where is the ball?") == POINT
    assert list(model.stream("Where is the ball?"))[-1] == POINT


def test_structured_output_without_a_schema(service):
    model = chat(service).with_structured_output(Point, method="json_mode", include_raw=True)
    answer = model.invoke("Answer in JSON.")
    assert answer["parsed"] == POINT and answer["parsing_error"] is None


def test_a_stream_that_breaks_off_raises(service):
    text = ""
    with pytest.raises(openai.APIError, match="failed on this request"):
        for chunk in chat(service, "echo").stream("raise after three tokens"):
            text += chunk.content
    assert text == "0 1 2 "


def test_errors(service):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
        chat(service).invoke("word " * 2000)
    with pytest.raises(openai.NotFoundError):
        chat(service, "gpt-9").invoke("Hello!")
    with pytest.raises(openai.AuthenticationError):
        chat(service, api_key=SecretStr("wrong")).invoke("Hello!")
    with pytest.raises(openai.RateLimitError):
        chat(service, base_url=service.limited_url).invoke("Hello!")
    with pytest.raises(openai.InternalServerError):
        list(chat(service, service.absent_model).stream("Hello!"))
