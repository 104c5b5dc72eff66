"""The chat engine with a model that reasons and calls tools: the events of its answers."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from protocol.events import Delta, ReasoningDelta, ToolCallDelta
from protocol.jobs import OutputFormat
from tests.engines import chat_templates as templates
from tests.engines.tiny_chat import Collector, Result, chat_job, make_engine, run
from tests.scripted_chat import save_scripted_model
from workers.engines.chat import ChatEngine

SCRIPTS = {
    "think": "<think>\nIt's 4.\nSure.\n</think>\n\nThe answer is 4.",
    "plain": "No thought needed.",
    "stop": "<think>STOP is a word</think>So is STOP, said the parrot.",
    "calls": 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "broken": '<tool_call>\n{"name": "weather", "arguments": {"city" "Rome"}}\n</tool_call>',
    "json": '{"a": 2}',
    "only": '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
    "long": "<think>" + " ".join(map(str, range(100))) + "</think>never",
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChatEngine, Collector]]:
    folder = save_scripted_model(tmp_path_factory.mktemp("scripted"), templates.QWEN3, SCRIPTS)
    engine, collector = make_engine(folder)
    yield engine, collector
    engine.close()


@pytest.fixture(scope="module")
def unthinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChatEngine, Collector]]:
    """The same without reasoning: what a grammar lets a model choose is calls alone."""
    folder = save_scripted_model(tmp_path_factory.mktemp("unthinking"), templates.HERMES, SCRIPTS)
    engine, collector = make_engine(folder)
    yield engine, collector
    engine.close()


_count = iter(range(1000))


def answer(scripted: tuple[ChatEngine, Collector], script: str, **sampling: Any) -> Result:
    job = chat_job(f"{script} {next(_count)}", script, **{"max_tokens": 200, **sampling})
    (result,) = run(*scripted, [job])
    return result


def reasoning(result: Result, index: int = 0) -> str:
    events = [event for event in result.events if isinstance(event, ReasoningDelta) and event.index == index]
    return "".join(event.text for event in events)


def test_reasoning_and_content_have_events_of_their_own(scripted):
    result = answer(scripted, "think")
    assert (reasoning(result), result.text()) == ("It's 4.\nSure.", "The answer is 4.")
    assert result.finish()[0] == "stop"
    kinds = [type(event) for event in result.events]
    assert kinds.index(Delta) == kinds.count(ReasoningDelta) > 1
    assert 0 < result.usage.reasoning_tokens < result.usage.completion_tokens


def test_every_token_is_in_one_event(scripted):
    result = answer(scripted, "think")
    tokens = sum(event.tokens for event in result.events if isinstance(event, Delta | ReasoningDelta))
    assert tokens == result.usage.completion_tokens


def test_an_answer_without_reasoning_is_content(scripted):
    result = answer(scripted, "plain")
    assert (reasoning(result), result.text()) == ("", SCRIPTS["plain"])
    assert result.usage.reasoning_tokens == 0


def test_several_choices_are_divided_each_by_itself(scripted):
    result = answer(scripted, "think", n=3)
    for index in range(3):
        assert (reasoning(result, index), result.text(index)) == ("It's 4.\nSure.", "The answer is 4.")
    assert result.usage.reasoning_tokens == 3 * answer(scripted, "think").usage.reasoning_tokens


def test_stop_strings_end_the_content(scripted):
    result = answer(scripted, "stop", stop=("STOP",))
    assert (reasoning(result), result.text()) == ("STOP is a word", "So is ")
    assert result.finish() == ("stop", "STOP")


def test_an_answer_that_ends_inside_the_reasoning_has_no_content(scripted):
    result = answer(scripted, "long", max_tokens=20)
    assert result.text() == "" and SCRIPTS["long"].startswith(f"<think>{reasoning(result)}")
    assert result.finish()[0] == "length" and len(reasoning(result)) > 20
    # the tag has two tokens here
    assert (result.usage.reasoning_tokens, result.usage.completion_tokens) == (19, 20)


def test_each_token_has_its_logprob(scripted):
    result = answer(scripted, "think", logprobs=0)
    found = [
        logprob
        for event in result.events
        if isinstance(event, Delta | ReasoningDelta)
        for logprob in event.logprobs or []
    ]
    assert "".join(logprob.token for logprob in found) == SCRIPTS["think"]


def test_an_answer_is_broken_off_inside_the_reasoning_at_its_deadline(scripted):
    engine, collector = scripted
    engine.submit(chat_job("deadline", "long", max_tokens=4000, ignore_eos=True))
    collector.wait_first("deadline")
    engine.cancel("deadline", "deadline")
    result = collector.result("deadline")
    assert result.finish()[0] == "length" and reasoning(result)


def test_a_model_that_does_not_reason_has_deltas_alone(tmp_path):
    folder = save_scripted_model(tmp_path, templates.HERMES, {"think": SCRIPTS["think"]})
    engine, collector = make_engine(folder)
    try:
        result = answer((engine, collector), "think")
        assert result.text() == SCRIPTS["think"] and result.usage.reasoning_tokens is None
        assert not any(isinstance(event, ReasoningDelta) for event in result.events)
    finally:
        engine.close()


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def call(
    scripted: tuple[ChatEngine, Collector], script: str, parallel: bool = True, **sampling: Any
) -> Result:
    made = chat_job(f"{script} {next(_count)}", script, **{"max_tokens": 200, **sampling})
    made = msgspec.structs.replace(made, tools=[WEATHER], parallel_tool_calls=parallel)
    (result,) = run(*scripted, [made])
    return result


def calls(result: Result, index: int = 0) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for event in result.events:
        if isinstance(event, ToolCallDelta) and event.index == index:
            if event.id:
                assert event.call == len(found) and not event.arguments
                found.append((event.name, ""))
            else:
                found[event.call] = found[event.call][0], found[event.call][1] + event.arguments
    return found


TWO = [("weather", '{"city": "Rome"}'), ("now", "{}")]


def test_calls_have_events_of_their_own(scripted):
    result = call(scripted, "calls", n=2)
    for index in range(2):
        assert calls(result, index) == TWO
        assert result.text(index) == "Let me look." and result.finish(index)[0] == "tool_calls"
    kinds = Delta | ReasoningDelta | ToolCallDelta
    tokens = sum(event.tokens for event in result.events if isinstance(event, kinds))
    assert tokens == result.usage.completion_tokens
    parts = [event for event in result.events if isinstance(event, ToolCallDelta) and event.arguments]
    assert len(parts) > 4


def test_without_parallel_calls_the_answer_ends_with_the_first(scripted):
    result = call(scripted, "calls", parallel=False)
    assert calls(result) == TWO[:1] and result.finish()[0] == "tool_calls"
    assert result.usage.completion_tokens < call(scripted, "calls").usage.completion_tokens - 5


def test_a_call_can_be_cut_by_max_tokens(scripted):
    whole = call(scripted, "calls").usage.completion_tokens
    ends = set()
    for limit in range(1, whole):
        result = call(scripted, "calls", max_tokens=limit)
        ends.add(result.finish()[0])
        assert "Let me look.\n<tool_call".startswith(result.text())
        stopped = call(scripted, "calls", max_tokens=limit, stop=("{",))
        assert (stopped.text(), stopped.finish()) == (result.text(), ("length", None))
        for (name, text), (expected, whole_text) in zip(calls(result), TWO, strict=False):
            assert name == expected and whole_text.startswith(text)
    assert ends == {"length"}


def test_a_call_that_is_no_json_is_content(scripted):
    result = call(scripted, "broken")
    assert result.text() == SCRIPTS["broken"] and result.finish()[0] == "stop"


def test_a_model_that_knows_no_tools_refuses_them(tmp_path):
    folder = save_scripted_model(tmp_path, templates.GEMMA_3, {"think": "Hello."})
    engine, collector = make_engine(folder)
    try:
        result = call((engine, collector), "think")
        assert (result.failed.code, result.failed.param) == ("unsupported_parameter", "tools")
        assert "'tiny'" in result.failed.message
    finally:
        engine.close()


# calls that must be, or must be right

BOUNDED = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NAMES = ("weather", "forecast")


def constrained(
    scripted: tuple[ChatEngine, Collector], script: str, params: dict[str, Any] | None = None, **fields: Any
) -> Result:
    schema = {"type": "function", "function": {"name": "", "parameters": BOUNDED}}
    tools = [{**schema, "function": {"name": name, "parameters": BOUNDED}} for name in NAMES]
    made = chat_job(f"{script} {next(_count)}", script, max_tokens=200, **(params or {}))
    made = msgspec.structs.replace(made, **{"tools": tools, **fields})
    (result,) = run(*scripted, [made])
    return result


def check(found: list[tuple[str, str]]) -> None:
    for name, text in found:
        arguments = json.loads(text)
        assert name in NAMES and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("required", [NAMES, NAMES[1:]])
def test_a_required_call_is_made_whatever_the_model_would_say(unthinking, required):
    for temperature in (0.0, 1.0):
        result = constrained(
            unthinking,
            "plain",
            {"n": 2, "temperature": temperature, "seed": 3},
            required_tools=list(required),
            parallel_tool_calls=False,
        )
        for index in range(2):
            found = calls(result, index)
            check(found)
            assert len(found) == 1 and found[0][0] in required
            assert result.text(index) == "" and result.finish(index)[0] == "tool_calls"


def test_a_strict_tool_gets_arguments_as_its_schema_says(scripted):
    """The model would send a city alone."""
    loose = constrained(scripted, "calls")
    assert calls(loose)[0] == TWO[0]
    strict = constrained(scripted, "calls", strict_tools=list(NAMES), parallel_tool_calls=False)
    check(calls(strict))
    assert len(calls(strict)) == 1 and strict.text() == "Let me look."
    assert strict.finish()[0] == "tool_calls"
    text = constrained(scripted, "plain", strict_tools=["weather"])
    assert text.text() == SCRIPTS["plain"] and text.finish()[0] == "stop"


def test_an_output_format_beside_tools_allows_calls_and_json(scripted):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = OutputFormat(kind="json_schema", text=json.dumps(schema), param="response_format")
    strict: dict[str, Any] = {
        "strict_tools": list(NAMES),
        "parallel_tool_calls": False,
        "output_format": wanted,
    }
    result = constrained(scripted, "only", **strict)
    check(calls(result))
    assert len(calls(result)) == 1 and result.text() == ""
    result = constrained(scripted, "json", **strict)
    assert json.loads(result.text()) == {"a": 1} and not calls(result)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"required_tools": ["bad"], "strict_tools": ["bad"]}, "tools.0.function.parameters"),
        ({"strict_tools": ["bad"]}, "tools.0.function.parameters"),
    ],
)
def test_parameters_that_cannot_be_enforced_are_refused_with_their_place(scripted, fields, param):
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
    result = constrained(scripted, "plain", tools=[bad], **fields)
    assert (result.failed.code, result.failed.param) == ("invalid_request", param)
    loose = constrained(scripted, "plain", tools=[bad])
    assert loose.text() == SCRIPTS["plain"]


def test_calls_of_a_notation_that_the_template_does_not_show_cannot_be_forced(tmp_path):
    folder = save_scripted_model(tmp_path, templates.GEMMA_3, {"think": "Hello."})
    engine, collector = make_engine(folder, tool_format="glm")
    try:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"required_tools": ["weather"]}, "tool_choice"),
            ({"strict_tools": ["forecast"]}, "tools.1.function.strict"),
        ]
        for fields, param in cases:
            result = constrained((engine, collector), "think", **fields)
            assert (result.failed.code, result.failed.param) == ("unsupported_parameter", param)
        assert constrained((engine, collector), "think").text() == "Hello."
    finally:
        engine.close()


def test_a_grammar_lets_the_model_begin_with_its_reasoning(tmp_path):
    scripts = {"think": "<think>It's 4, I think.</think>\n\nThe answer is 4."}
    folder = save_scripted_model(tmp_path, templates.QWEN3, scripts, special=("<think>",))
    engine, collector = make_engine(folder)
    fields: dict[str, Any] = {"required_tools": ["weather"], "parallel_tool_calls": False}
    try:
        result = constrained((engine, collector), "think", {"n": 2}, **fields)
        for index in range(2):
            check(calls(result, index))
            assert len(calls(result, index)) == 1 and result.text(index) == ""
            assert reasoning(result, index) == "It's 4, I think."
    finally:
        engine.close()


def test_a_grammar_begins_behind_the_reasoning_that_the_prompt_begins(tmp_path):
    """The chat template writes the opening tag, so that the answer begins inside the reasoning."""
    template = templates.QWEN3_THINKING.replace("{{- '<think>\n' -}}", "{%- set opened = true -%}")
    assert template != templates.QWEN3_THINKING
    scripts = {"think": "It's 4, I think.</think>\n\nThe answer is 4."}
    folder = save_scripted_model(tmp_path, template, scripts, special=("<think>",), opening="<think>")
    engine, collector = make_engine(folder)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [4]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = OutputFormat(kind="json_schema", text=json.dumps(schema), param="response_format")
    try:
        made = msgspec.structs.replace(chat_job("r", "think", max_tokens=200), output_format=wanted)
        (result,) = run(engine, collector, [made])
        assert reasoning(result) == "It's 4, I think." and json.loads(result.text()) == {"a": 4}
        result = constrained(
            (engine, collector), "think", required_tools=["weather"], parallel_tool_calls=False
        )
        assert reasoning(result) == "It's 4, I think."
        check(calls(result))
        assert result.text() == "" and len(calls(result)) == 1
    finally:
        engine.close()
