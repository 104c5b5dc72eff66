"""Reasoning and calls of tools through gunicorn and a worker, as the OpenAI client sees them.

The model is a real one whose answers are written beforehand.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.deployment import Deployment
from tests.engines import chat_templates as templates
from tests.scripted_chat import save_scripted_model

SCRIPTS = {
    "think": "<think>\nIt's 4.\nSure.\n</think>\n\nThe answer is 4.",
    "weather": "<think>They ask for Rome.</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "only": '<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>',
    "broken": '<tool_call>\n{"name": "now", "arguments": {"zone" "UTC"}}\n</tool_call>',
    "retried": '<tool_call>\n{"name": "now", "arguments": {"zone": tru}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "sunny": "It is sunny in Rome.",
    "long": "<think>" + " ".join(map(str, range(100))) + "</think>never",
}

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Looks out of the window.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]

CATALOGUE = """
project = "Test"
[[models]]
name = "scripted"
tasks = ["chat"]
weights = "{weights}"
workers = [[]]
[models.engine]
torch_threads = 1
[[models]]
name = "toolless"
tasks = ["chat"]
weights = "{weights}"
workers = [[]]
[models.engine]
torch_threads = 1
tool_format = "none"
[[models]]
name = "unthinking"
tasks = ["chat"]
weights = "{unthinking}"
workers = [[]]
[models.engine]
torch_threads = 1
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("answers")
    weights = save_scripted_model(folder / "model", templates.QWEN3, SCRIPTS)
    unthinking = save_scripted_model(folder / "unthinking", templates.HERMES, SCRIPTS)
    catalogue = CATALOGUE.format(weights=weights, unthinking=unthinking)
    with Deployment(folder, catalogue=catalogue) as service:
        service.start("scripted", "toolless", "unthinking")
        with openai.OpenAI(
            base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            yield client


def ask(client: openai.OpenAI, script: str, model: str = "scripted", **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": script}]
    return client.chat.completions.create(model=model, messages=messages, **fields)


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


def test_calls_are_in_the_message(client):
    choice = ask(client, "weather", tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == (
        "Let me look.",
        "They ask for Rome.",
    )
    found = [
        (call.type, call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls
    ]
    assert found == [("function", "get_weather", {"city": "Rome", "days": 3}), ("function", "now", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_streamed_calls_are_those_of_the_whole_answer(client):
    """Put together as OpenAI's guide does it, and by the client's own helper."""
    calls: dict[int, Any] = {}
    content = ""
    for chunk in ask(client, "weather", tools=TOOLS, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            if part.index not in calls:
                assert part.id and part.type == "function" and part.function.name
                calls[part.index] = part
            else:
                assert part.id is None and part.function.name is None
                calls[part.index].function.arguments += part.function.arguments
    assert choice.finish_reason == "tool_calls" and content == "Let me look."
    whole = ask(client, "weather", tools=TOOLS).choices[0].message
    streamed = [(call.function.name, call.function.arguments) for call in calls.values()]
    assert streamed == [(call.function.name, call.function.arguments) for call in whole.tool_calls]
    messages: Any = [{"role": "user", "content": "weather"}]
    with client.chat.completions.stream(model="scripted", messages=messages, tools=TOOLS) as events:
        message = events.get_final_completion().choices[0].message
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls or []] == streamed


def test_a_call_without_text_has_null_as_content(client):
    choice = ask(client, "only", tools=TOOLS).choices[0]
    assert choice.message.content is None and choice.message.tool_calls[0].function.name == "now"


def test_the_result_of_a_call_goes_back_to_the_model(client):
    question = {"role": "user", "content": "weather"}
    message = ask(client, "weather", tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history: Any = [question, message.model_dump(), result]
    answer = client.chat.completions.create(model="scripted", messages=history, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny in Rome."
    short: Any = [question, result | {"role": "user"}]
    del short[1]["tool_call_id"]
    alone = client.chat.completions.create(model="scripted", messages=short, tools=TOOLS)
    assert answer.usage is not None and alone.usage is not None
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + 100


def test_tools_reach_the_template_unless_the_choice_is_none(client):
    with_tools = ask(client, "only", tools=TOOLS)
    without = ask(client, "only", tools=TOOLS, tool_choice="none")
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 100
    assert (
        without.choices[0].finish_reason == "stop" and without.choices[0].message.content == SCRIPTS["only"]
    )


def test_without_parallel_calls_there_is_one(client):
    choice = ask(client, "weather", tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"


def test_without_parallel_calls_a_broken_one_leaves_room_for_another(client):
    fields: Any = {"tools": TOOLS, "parallel_tool_calls": False}
    choice = ask(client, "retried", **fields).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    assert choice.finish_reason == "tool_calls"
    streamed = [chunk.choices[0] for chunk in ask(client, "retried", stream=True, **fields)]
    parts = [part for choice in streamed for part in choice.delta.tool_calls or []]
    assert [part.function.name for part in parts if part.id] == ["now", "get_weather"]
    last = [part.function.arguments for part in parts if part.index == parts[-1].index]
    assert "".join(last) == call.function.arguments and streamed[-1].finish_reason == "tool_calls"


def test_a_broken_call_is_text(client):
    choice = ask(client, "broken", tools=TOOLS).choices[0]
    assert choice.message.content == SCRIPTS["broken"] and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    chunks = list(ask(client, "broken", tools=TOOLS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SCRIPTS["broken"]


def test_a_model_without_a_format_refuses_tools_by_name(client):
    messages: Any = [{"role": "user", "content": "only"}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="'toolless'") as caught:
            client.chat.completions.create(model="toolless", messages=messages, tools=TOOLS, stream=stream)
        assert caught.value.param == "tools"
    assert client.chat.completions.create(model="toolless", messages=messages).choices[0].message.content


FORECAST: Any = {
    "type": "function",
    "function": {
        "name": "forecast",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
def test_a_call_can_be_required(client, choice, stream):
    """The model would say something else."""
    fields: dict[str, Any] = {"tools": [FORECAST], "tool_choice": choice, "parallel_tool_calls": False}
    fields["model"] = "unthinking"
    if stream:
        parts = [chunk.choices[0] for chunk in ask(client, "sunny", stream=True, **fields)]
        calls = [part for choice in parts for part in choice.delta.tool_calls or []]
        name, arguments = calls[0].function.name, "".join(call.function.arguments for call in calls)
        assert parts[-1].finish_reason == "tool_calls"
    else:
        (found,) = ask(client, "sunny", **fields).choices[0].message.tool_calls
        name, arguments = found.function.name, found.function.arguments
    made = json.loads(arguments)
    assert name == "forecast" and made["city"] in ("Rome", "Oslo") and 1 <= made["days"] <= 9


def test_a_strict_tool_may_be_left_alone(client):
    assert ask(client, "sunny", tools=[FORECAST]).choices[0].message.content == SCRIPTS["sunny"]


def test_parameters_that_cannot_be_enforced_are_refused_with_their_place(client):
    bad = json.loads(json.dumps(FORECAST))
    bad["function"]["parameters"]["properties"]["city"] = {"not": {"const": "Rome"}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "sunny", tools=[*TOOLS, bad])
    assert caught.value.param == "tools.2.function.parameters"
