"""The fields that ask for structured output: OpenAI's `response_format`, vLLM's `structured_outputs` and the
`guided_*` fields that vLLM had before.

Only their form is checked here. What the schema or grammar says is checked by the worker, which compiles it.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema, model_validator

from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import OutputFormat

MAX_BYTES = 64 * 2**10
"""Of a schema, as JSON, or of a grammar."""

MAX_CHOICES = 1000
ANY_OBJECT = '{"type":"object"}'

Schema = dict[str, Any]
Text = Annotated[StrictStr, Field(min_length=1)]
Refused = Annotated[Any, WithJsonSchema({"enum": [None, False]})]
Choice = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


def _schema_needs_type(schema: dict[str, Any]) -> None:
    """State in JSON Schema that `json_schema` belongs to the type of that name."""
    schema["anyOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
    ]


class JsonSchemaFormat(BaseModel):
    """A named schema. It is enforced whether `strict` is set or not."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[StrictStr, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's form."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_schema_needs_type)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema requires the field json_schema")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's form: one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    model_config = ConfigDict(extra="ignore")

    json_: Annotated[Schema | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choice | None = None
    grammar: Text | None = None
    json_object: StrictBool | None = None
    # accepted, because both are always so here
    disable_any_whitespace: StrictBool | None = None
    disable_fallback: StrictBool | None = None
    # refused by `output_format`
    disable_additional_properties: Refused = None
    whitespace_pattern: Refused = None
    structural_tag: Refused = None


class OutputFormatFields(BaseModel):
    """The fields of a request that ask for structured output."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choice | None = None
    guided_grammar: Text | None = None
    # refused by `output_format`
    guided_whitespace_pattern: Refused = None

    def output_format(self) -> OutputFormat | None:
        """Return what the answer must be; None: anything. Raises InvalidRequest and UnsupportedParameter."""
        outputs = self.structured_outputs or StructuredOutputs()
        for name in ("disable_additional_properties", "whitespace_pattern", "structural_tag"):
            _refuse(f"structured_outputs.{name}", getattr(outputs, name))
        _refuse("guided_whitespace_pattern", self.guided_whitespace_pattern)
        name = "structured_outputs"
        wanted = [
            *_response_format(self.response_format),
            *_formats(name, outputs.json_, outputs.regex, outputs.choice, outputs.grammar),
            *([OutputFormat(kind="json_schema", text=ANY_OBJECT, param=name)] if outputs.json_object else []),
            *_formats("guided_json", self.guided_json),
            *_formats("guided_regex", regex=self.guided_regex),
            *_formats("guided_choice", choice=self.guided_choice),
            *_formats("guided_grammar", grammar=self.guided_grammar),
        ]
        if self.structured_outputs is not None and not any(one.param == name for one in wanted):
            raise InvalidRequest(
                f"{name} requires one of json, regex, choice, grammar and json_object", param=name
            )
        if len(wanted) > 1:
            raise InvalidRequest(
                f"{wanted[1].param} asks for a second format of the answer; send one", param=wanted[1].param
            )
        for one in wanted:
            if len(one.text.encode()) > MAX_BYTES:
                raise InvalidRequest(
                    f"{one.param} must have at most {MAX_BYTES:,} bytes (it has {len(one.text.encode()):,})",
                    param=one.param,
                )
        return wanted[0] if wanted else None


def _refuse(name: str, value: object) -> None:
    if value is not None and value is not False:
        raise UnsupportedParameter(f"{name} is not supported; leave it out", param=name)


def _response_format(given: ResponseFormat | None) -> list[OutputFormat]:
    if given is None or given.type == "text":
        return []
    schema = given.json_schema.schema_ if given.json_schema and given.type == "json_schema" else None
    text = ANY_OBJECT if schema is None else _encode(schema)
    return [OutputFormat(kind="json_schema", text=text, param="response_format")]


def _formats(
    param: str,
    schema: Schema | str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[OutputFormat]:
    """Return those that are given."""
    if isinstance(schema, str):
        schema = _decode(schema, param)
    texts: list[tuple[Literal["json_schema", "regex", "choice", "grammar"], str | None]] = [
        ("json_schema", None if schema is None else _encode(schema)),
        ("regex", regex),
        ("choice", None if choice is None else _encode(choice)),
        ("grammar", grammar),
    ]
    return [OutputFormat(kind=kind, text=text, param=param) for kind, text in texts if text is not None]


def _decode(text: str, param: str) -> Schema:
    """Read a schema that was sent as text. Raises InvalidRequest."""
    try:
        schema: Schema = msgspec.json.decode(text, type=Schema)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest(
            f"{param}: a schema that is sent as text must be a JSON object", param=param
        ) from None
    return schema


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
