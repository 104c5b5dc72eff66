"""The demo chat model calls the tools of a request, and answers with their results."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from demo.tool_questions import ADD, QUESTIONS, calculations
from protocol.events import ToolCallDelta
from tests.deployment import ROOT
from tests.engines.tiny_chat import Collector, Result, chat_job, make_engine, run
from workers.engines.chat import ChatEngine

Engine = tuple[ChatEngine, Collector]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine, collector = make_engine(ROOT / "demo" / "models" / "chat")
    yield engine, collector
    engine.close()


_count = iter(range(1000))


def ask(
    engine: Engine, asked: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]], **fields: Any
) -> list[Result]:
    """Send messages and tools, all at once."""
    job = chat_job("", max_tokens=200)
    return run(
        *engine,
        [
            msgspec.structs.replace(job, id=str(next(_count)), messages=messages, tools=tools, **fields)
            for messages, tools in asked
        ],
    )


def calls(result: Result) -> list[tuple[str, Any]]:
    """Put the parts of the calls together."""
    names, texts = [], []
    for event in result.events:
        if isinstance(event, ToolCallDelta):
            if event.id:
                names.append(event.name)
                texts.append("")
            texts[event.call] += event.arguments
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def test_it_calls_the_tool_that_a_question_needs(engine: Engine) -> None:
    results = ask(engine, [(asked.messages()[:1], asked.tools) for asked in QUESTIONS])
    for asked, result in zip(QUESTIONS, results, strict=True):
        assert calls(result) == asked.calls, asked.question
        assert result.finish()[0] == ("tool_calls" if asked.calls else "stop")
        assert result.text() == ("" if asked.calls else asked.answer)


def test_it_answers_with_the_results(engine: Engine) -> None:
    called = [asked for asked in QUESTIONS if asked.calls]
    results = ask(engine, [(asked.messages()[:-1], asked.tools) for asked in called])
    for asked, result in zip(called, results, strict=True):
        assert (result.text(), calls(result)) == (asked.answer, [])


def test_it_copies_numbers_that_it_was_not_trained_with(engine: Engine) -> None:
    """One of twenty may be wrong."""
    questions = list(calculations(100))
    asked = ask(engine, [(each.messages()[:1], each.tools) for each in questions])
    right = sum(calls(result) == each.calls for each, result in zip(questions, asked, strict=True))
    answers = ask(engine, [(each.messages()[:-1], each.tools) for each in questions])
    told = sum(result.text() == each.answer for each, result in zip(questions, answers, strict=True))
    assert right >= 95 <= told, (right, told)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_required_call_is_the_one_that_it_makes_by_itself(engine: Engine, parallel: bool) -> None:
    asked = QUESTIONS[0]
    (result,) = ask(
        engine,
        [(asked.messages()[:1], [ADD])],
        required_tools=["add"],
        parallel_tool_calls=parallel,
    )
    assert calls(result) == asked.calls and result.finish()[0] == "tool_calls"


def test_without_tools_it_knows_no_sums(engine: Engine) -> None:
    (result,) = ask(engine, [([{"role": "user", "content": "What is 3 + 4?"}], [])])
    assert result.text().startswith("I am sorry")
