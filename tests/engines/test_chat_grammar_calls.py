"""Compiling the schemas of tools: bounds for all together, and which tools may do without theirs."""

import json
from typing import Any

import pytest

from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, OutputFormat
from tests.engines import chat_templates as templates
from tests.engines.test_chat_answer_calls import job
from tests.engines.test_chat_answer_thinking import tokenizer
from tests.engines.test_chat_grammar import COMPILER, accepts, multiples, patterns, text_of
from workers.engines.chat.answer.call_format import derive
from workers.engines.chat.answer.call_grammar import CallGrammar
from workers.engines.chat.answer.constraint import constrain
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkTags
from workers.engines.chat.grammar import sources
from workers.engines.chat.grammar.matcher import Grammar


def call_grammar() -> CallGrammar:
    probe = TemplateProbe(tokenizer(templates.HERMES))
    calls = derive(probe, ThinkTags.of(probe))
    assert calls is not None
    return CallGrammar(calls, {})


GRAMMAR = call_grammar()
ARGUMENTS = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
HOSTILE = {"type": "integer", "multipleOf": 99_999_989}
MANY = 128


def tools(*schemas: Any) -> dict[str, Any]:
    """Fields of a job with a required call: the tools have the names t0, t1 …"""
    made = [
        {"type": "function", "function": {"name": f"t{at}", "parameters": schema}}
        for at, schema in enumerate(schemas)
    ]
    return {"tools": made, "required_tools": [f"t{at}" for at in range(len(made))]}


def compiled(made: ChatJob) -> Grammar:
    wanted = constrain(made, GRAMMAR)
    assert wanted is not None
    return COMPILER.compile(wanted, "tiny")


def noted_schemas(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the schemas that llguidance gets from now on."""
    seen: list[Any] = []
    source = sources._json_source

    def noted(schema: Any) -> str:
        seen.append(schema)
        return source(schema)

    monkeypatch.setattr(sources, "_json_source", noted)
    return seen


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("schemas", "words"),
    [
        ([{"type": "integer", "multipleOf": 19_997 - at} for at in range(MANY)], "multipleOf"),
        ([text_of(10)] * MANY, "properties"),
        ([{"enum": list(range(10))}] * MANY, "enum"),
        ([ARGUMENTS, multiples(101), multiples(103, 107)], "multipleOf"),
    ],
    ids=["multiples", "properties", "values", "multiples of few"],
)
def test_bounds_hold_for_all_enforced_schemas_together(schemas, words, monkeypatch):
    fields = tools(*schemas)
    seen = noted_schemas(monkeypatch)
    with pytest.raises(InvalidRequest, match=words) as caught:
        compiled(job(**fields, strict_tools=fields["required_tools"]))
    assert (caught.value.param or "").startswith("tools.") and len(seen) < len(schemas)


def test_tools_that_are_not_strict_do_without_their_schemas_beyond_the_bounds():
    schemas = [{"type": "integer", "multipleOf": 19_997 - at} for at in range(3)]
    grammar = compiled(job(**tools(*schemas, ARGUMENTS), strict_tools=["t3"]))
    # those that come first have room
    assert accepts(grammar, call("t0", "19997")) and not accepts(grammar, call("t0", '{"b": 2}'))
    assert accepts(grammar, call("t1", '{"b": 2}')) and not accepts(grammar, call("t1", "19996"))
    assert accepts(grammar, call("t3", '{"a": 1}')) and not accepts(grammar, call("t3", '{"a": 2}'))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "object", "not": {"required": ["b"]}},
        {"type": "object", "propertyNames": {"maxLength": 3}},
        {"type": "object", "properties": {"a": {"type": "number", "minimum": 10**400}}},
        {"type": "object", "properties": {"a": {"type": "text"}}},
        HOSTILE,
        {"allOf": patterns(20)},
        {"type": "object", "description": "x" * 70_000},
    ],
    ids=["uniqueItems", "not", "propertyNames", "digits", "type", "multiple", "patterns", "length"],
)
def test_what_cannot_be_enforced_is_any_object_without_strict_and_refused_with_it(schema):
    fields = tools(schema, ARGUMENTS)
    grammar = compiled(job(**fields, strict_tools=["t1"]))
    assert accepts(grammar, call("t0", '{"b": [2, 2]}')) and not accepts(grammar, call("t0", "[]"))
    assert accepts(grammar, call("t1", '{"a": 1}')) and not accepts(grammar, call("t1", '{"a": 2}'))
    with pytest.raises(InvalidRequest) as caught:
        compiled(job(**fields, strict_tools=["t0"]))
    assert (caught.value.param or "").startswith("tools")


def test_a_hostile_schema_is_never_compiled(monkeypatch):
    seen = noted_schemas(monkeypatch)
    compiled(job(**tools(HOSTILE, ARGUMENTS)))
    assert seen == [ARGUMENTS]


def test_schemas_that_are_too_much_together_are_given_up_where_that_is_allowed():
    long = {"type": "array", "prefixItems": [{}] * 8000}
    fields = tools(ARGUMENTS, long, long)
    grammar = compiled(job(**fields, strict_tools=["t0", "t1"]))
    assert accepts(grammar, call("t0", '{"a": 1}')) and not accepts(grammar, call("t0", '{"a": 2}'))
    assert accepts(grammar, call("t1", "[]")) and not accepts(grammar, call("t1", "{}"))
    assert accepts(grammar, call("t2", "{}")) and not accepts(grammar, call("t2", "[]"))
    with pytest.raises(InvalidRequest, match="grammar size") as caught:
        compiled(job(**fields, strict_tools=["t0", "t1", "t2"]))
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("names", [{"type": "string"}, {}, True], ids=str)
def test_names_that_are_strings_say_nothing(names):
    schema = {"type": "object", "properties": {"a": {"propertyNames": names, "type": "object"}}}
    grammar = compiled(job(**tools({**schema, "required": ["a"]}), strict_tools=["t0"]))
    assert accepts(grammar, call("t0", '{"a": {"b": 1}}')) and not accepts(grammar, call("t0", '{"a": 1}'))


@pytest.mark.parametrize("required", [["t0"], []])
def test_formats_that_are_no_schema_are_refused_beside_tools(required):
    fields = {**tools(ARGUMENTS), "required_tools": required}
    wanted = OutputFormat(kind="regex", text="[0-9", param="guided_regex")
    with pytest.raises(UnsupportedParameter, match="can't be combined with tools") as caught:
        compiled(job(**fields, output_format=wanted))
    assert caught.value.param == "guided_regex"


def test_a_schema_beside_a_required_call_is_checked_and_has_no_effect():
    def wanted(schema: Any) -> OutputFormat:
        return OutputFormat(kind="json_schema", text=json.dumps(schema), param="response_format")

    for schema in ({"uniqueItems": True}, {"type": "text"}, HOSTILE):
        with pytest.raises(InvalidRequest) as caught:
            compiled(job(**tools(ARGUMENTS), output_format=wanted(schema)))
        assert caught.value.param == "response_format"
    grammar = compiled(job(**tools(ARGUMENTS), output_format=wanted({"type": "null"})))
    assert accepts(grammar, call("t0", '{"a": 1}')) and not accepts(grammar, "null")
