"""app.chat.output_format: the fields that ask for structured output, and what they become in the job."""

import json
from typing import Any

import pytest

from app.chat.output_format import MAX_BYTES, MAX_CHOICES
from app.chat.schema import ChatCompletionRequest
from app.http.request_body import ignored_params
from app.http.validation import parse
from catalogue import ChatModelEntry
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import OutputFormat, decode, encode

ENTRY = ChatModelEntry.model_validate({"name": "chat", "tasks": ["chat"], "weights": "w"})
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "naïve"}}}
NAMED = {"name": "a_name-1", "schema": SCHEMA}


def request(body: dict[str, Any]) -> ChatCompletionRequest:
    return parse(
        ChatCompletionRequest, {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **body}
    )


def wanted(body: dict[str, Any]) -> OutputFormat | None:
    return request(body).to_job("id", ENTRY).output_format


@pytest.mark.parametrize(
    ("body", "kind", "value", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            "json_schema",
            SCHEMA,
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {**NAMED, "strict": True, "description": "d"},
                }
            },
            "json_schema",
            SCHEMA,
            "response_format",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA, "structured_outputs"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA, "structured_outputs"),
        (
            {"structured_outputs": {"json_object": True}},
            "json_schema",
            {"type": "object"},
            "structured_outputs",
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"], "structured_outputs"),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "guided_json"),
        ({"guided_choice": ["a", "ü"]}, "choice", ["a", "ü"], "guided_choice"),
    ],
)
def test_fields_become_a_format_of_the_job(body, kind, value, param):
    found = wanted(body)
    assert found is not None
    assert (found.kind, json.loads(found.text), found.param) == (kind, value, param)
    # models write properties in the order of the schema
    assert list(json.loads(found.text)) == list(value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+", "structured_outputs")),
        ({"structured_outputs": {"grammar": "start: x"}}, ("grammar", "start: x", "structured_outputs")),
        ({"guided_regex": "a+"}, ("regex", "a+", "guided_regex")),
        ({"guided_grammar": "start: x"}, ("grammar", "start: x", "guided_grammar")),
    ],
)
def test_patterns_and_grammars_pass_unchanged(body, expected):
    found = wanted(body)
    assert found is not None and (found.kind, found.text, found.param) == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": None, "guided_json": None, "guided_whitespace_pattern": None},
    ],
)
def test_nothing_is_asked_for(body):
    assert wanted(body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"json": "not json"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice.1"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json"),
    ],
)
def test_a_field_of_another_form_is_refused_by_name(body, param):
    with pytest.raises(InvalidRequest) as caught:
        wanted(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name(body, param):
    with pytest.raises(UnsupportedParameter) as caught:
        wanted(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("guided_grammar", lambda text: text),
        ("guided_regex", lambda text: text),
        ("guided_json", lambda text: {"const": text}),
        ("guided_choice", lambda text: [text]),
    ],
)
def test_the_size_is_bounded_in_bytes(name, around):
    assert wanted({name: around("x" * (MAX_BYTES - 20))})
    for text in ("x" * (MAX_BYTES + 1), "ü" * (MAX_BYTES // 2 + 1)):
        with pytest.raises(InvalidRequest, match="65,536 bytes") as caught:
            wanted({name: around(text)})
        assert caught.value.param == name


def test_the_format_travels_with_the_job():
    job = request({"guided_json": SCHEMA}).to_job("id", ENTRY)
    assert decode(*encode(job)) == job
    assert job.output_format is not None


def test_fields_with_another_name_in_the_class_count_as_known():
    body: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {**NAMED, "extra": 1}},
        "structured_outputs": {"json": SCHEMA, "backend": "xgrammar"},
    }
    assert (
        ignored_params(request(body), body) == "response_format.json_schema.extra, structured_outputs.backend"
    )


def test_a_format_and_tools_go_together():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice in (None, "none", "required"):
        assert wanted({"guided_json": SCHEMA, "tools": tools, "tool_choice": choice}) is not None
