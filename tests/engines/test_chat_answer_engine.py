"""The chat engine with a model that reasons and calls tools: the events of its answers."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from protocol.events import Delta, ReasoningDelta, ToolCallDelta
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
    "long": "<think>" + " ".join(map(str, range(100))) + "</think>never",
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChatEngine, Collector]]:
    folder = save_scripted_model(tmp_path_factory.mktemp("scripted"), templates.QWEN3, SCRIPTS)
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
