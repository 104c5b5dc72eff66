"""GET /openapi.json: the API's description, request schemas taken from the classes that validate.

tests/security/test_fuzz.py holds every word of it against the running service: what the schemas allow is served, what they
forbid is refused, and every answer is as declared. What JSON Schema can't say (one field's bound by another, a model's own
limits, that 1.0 is no whole number here) is a 400 that names the field.
"""

from typing import Any

from pydantic import BaseModel

from app.chat.schema import ChatCompletionRequest
from app.images.schema import ABSENT_AS_ZERO, ImageEditRequest, ImageGenerationRequest

REF = "#/components/schemas/{model}"

_INTEGER = {"type": "integer"}
_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_NULLABLE_STRING = {"type": ["string", "null"]}
_BINARY = {"type": "string", "format": "binary"}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""Pydantic's own words, which it leaves where bounds stand at a union; JSON Schema would take them for comments."""
_NOT_BLANK = r"[^\s\u001c-\u001f\u0085]"
"""Python's idea of blank, which has a few control characters more than the regular expressions of JSON Schema."""
_EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "a chunk as JSON, an error, or [DONE] at the end"}
    },
    "required": ["data"],
}
_SIZE = r"^(auto|[0-9]{1,6}x[0-9]{1,6})?$"

_GENERATING_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503, 504)


def describe(server_url: str, *, keyed: bool = False) -> dict[str, Any]:
    """An OpenAPI 3.1 document. `keyed`: API_KEYS is set."""
    schemas: dict[str, Any] = {
        "Error": _error(),
        "ChatCompletion": _chat_completion(),
        "ImagesResponse": _images_response(),
        **_operators_schemas(),
    }
    paths = {**_generating_paths(schemas), **_looking_paths()}
    _add_pictures(schemas["ImageEditRequest"])
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Model service",
            "version": "1",
            "description": "OpenAI's API, with the node's standard.",
        },
        "servers": [{"url": server_url}],
        "components": {"schemas": {name: _json_schema(schema) for name, schema in schemas.items()}},
        "paths": paths,
    }
    if keyed:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"bearer": []}]
    return document


def _generating_paths(schemas: dict[str, Any]) -> dict[str, Any]:
    """The end points that a worker answers; what their bodies need is added to `schemas`."""
    images = {"application/json": _ref("ImagesResponse")}
    return {
        "/v1/chat/completions": {
            "post": _generating(
                "Answer a conversation",
                {"application/json": _request(schemas, ChatCompletionRequest)},
                {"application/json": _ref("ChatCompletion"), "text/event-stream": _EVENT},
            )
        },
        "/v1/images/generations": {
            "post": _generating(
                "Draw pictures", {"application/json": _request(schemas, ImageGenerationRequest)}, images
            )
        },
        "/v1/images/edits": {
            "post": _generating(
                "Edit a picture",
                {
                    "application/json": _request(schemas, ImageEditRequest),
                    "multipart/form-data": _edit_form(),
                },
                images,
            )
        },
    }


def _looking_paths() -> dict[str, Any]:
    """The end points that the web process answers by itself."""
    return {
        "/v1/models": {"get": _get("The models and where they are called", "Models")},
        "/v1/models/{name}": {"get": _get("One model", "Model", parameter="name", errors=(404,))},
        "/v1/workers": {"get": _get("The workers and their state", "Workers")},
        "/v1/images/files/{name}": {"get": _picture_file()},
        "/healthz": {"get": _get("This process lives", "Health", open_to_all=True)},
        "/readyz": {
            "get": _get("Every model has a worker", "Readiness", also={503: "Readiness"}, open_to_all=True)
        },
        "/metrics": {"get": _get("Prometheus figures", {"text/plain": {"schema": _STRING}})},
        "/openapi.json": {"get": _get("This document", {"application/json": {"schema": {"type": "object"}}})},
    }


def _edit_form() -> dict[str, Any]:
    return _object(
        {
            "image": {**_BINARY, "minLength": 1},
            "mask": _BINARY,
            "prompt": {**_STRING, "pattern": _NOT_BLANK},
            "model": _STRING,
            "n": {**_INTEGER, "minimum": 0},
            "size": {**_STRING, "pattern": _SIZE},
            "response_format": {"enum": ["", "url", "b64_json"]},
        },
        required=["image", "prompt"],
    )


def _generating(summary: str, bodies: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in bodies.items()},
        },
        "responses": {
            "200": {
                "description": "the answer, or its stream",
                "content": {kind: {"schema": schema} for kind, schema in answers.items()},
            },
            **_errors(*_GENERATING_ERRORS),
        },
    }


def _get(
    summary: str,
    answer: str | dict[str, Any],
    parameter: str | None = None,
    errors: tuple[int, ...] = (),
    also: dict[int, str] | None = None,
    open_to_all: bool = False,
) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}} if isinstance(answer, str) else answer
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **_errors(*errors)},
    }
    if open_to_all:
        operation["security"] = []
    else:
        operation["responses"] |= _errors(401)
    for status, name in (also or {}).items():
        operation["responses"][str(status)] = {
            "description": summary,
            "content": {"application/json": {"schema": _ref(name)}},
        }
    if parameter:
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": _STRING}]
    return operation


def _picture_file() -> dict[str, Any]:
    picture = {"image/png": {"schema": _BINARY}}
    return _get("A finished picture", picture, parameter="name", errors=(404, 503), open_to_all=True)


def _request(schemas: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    properties = schema["properties"]
    if "prompt" in properties:
        _allow_absent(properties)
    return _ref(model.__name__)


def _allow_absent(properties: dict[str, Any]) -> None:
    """What pydantic can't tell of picture requests: its own validators, and values that count as absent."""
    for name in ABSENT_AS_ZERO:
        properties[name] = {"type": ["integer", "null"], "minimum": 0}
    properties["size"] = {"type": ["string", "null"], "pattern": _SIZE}
    properties["response_format"] = {"enum": [None, "", "url", "b64_json"]}
    properties["prompt"]["pattern"] = _NOT_BLANK


def _add_pictures(schema: dict[str, Any]) -> None:
    """The pictures of a JSON edit, which app.images.body takes out before pydantic sees the body."""
    one = {**_STRING, "minLength": 1, "description": "an http(s) URL, a data: URL or base64"}
    picture = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": 1}]}
    schema["properties"]["image"] = picture
    schema["properties"]["mask"] = {"anyOf": [picture, {"type": "null"}]}
    schema["required"] = [*schema["required"], "image"]


def _json_schema(schema: Any) -> Any:
    """Pydantic's schema without its own words for bounds."""
    if isinstance(schema, list):
        return [_json_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(name, name): _json_schema(part) for name, part in schema.items()}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {str(status): {"description": "error", "content": content} for status in statuses}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(model=name)}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _error() -> dict[str, Any]:
    detail = _object({"message": _STRING, "type": _STRING, "param": _NULLABLE_STRING, "code": _STRING})
    return _object(
        {
            "code": {**_INTEGER, "minimum": 400, "description": "the HTTP status; never 0"},
            "message": _STRING,
            "error": detail,
        }
    )


def _operators_schemas() -> dict[str, Any]:
    status = {"code": {"const": 0}, "message": _STRING}
    model = {
        **dict.fromkeys(("model", "url", "id", "owned_by"), _STRING),
        "object": {"const": "model"},
        "created": _INTEGER,
        "task": {"enum": ["chat", "generation", "edit"]},
    }
    worker = {
        **dict.fromkeys(("cid", "model", "host", "last_error"), _STRING),
        **dict.fromkeys(("pid", "running", "steps"), _INTEGER),
        "tasks": _array(_STRING),
        "gpus": _array(_STRING),
        "state": {"enum": ["loading", "ready", "draining", "lost"]},
        "registered": _BOOLEAN,
    }
    details = {
        "redis": {"enum": ["ok", "unreachable"]},
        "models_without_worker": _array(_STRING),
        "warnings": _array(_STRING),
    }
    return {
        "Health": _object(status),
        "Readiness": _object(
            {"code": {"enum": [0, 503]}, "message": _STRING, **details}, required=["code", "message"]
        ),
        "Model": _object(status | model),
        "Models": _object(
            {**status, "project": _STRING, "object": {"const": "list"}, "data": _array(_object(model))}
        ),
        "Workers": _object({**status, "data": _array(_object(worker))}),
    }


def _chat_completion() -> dict[str, Any]:
    message = _object({"role": _STRING, "content": _STRING})
    choice = _object(
        {"index": _INTEGER, "message": message, "finish_reason": {"enum": ["stop", "length"]}},
        required=["index", "message", "finish_reason"],
    )
    counts = ["prompt_tokens", "completion_tokens", "total_tokens"]
    return _object(
        {
            "code": {"const": 0},
            "message": {"const": "success"},
            "id": _STRING,
            "created": _INTEGER,
            "model": _STRING,
            "choices": {"type": "array", "minItems": 1, "items": choice},
            "usage": _object(dict.fromkeys(counts, _INTEGER), required=counts),
        },
        required=["code", "message", "created", "model", "choices", "usage"],
    )


def _images_response() -> dict[str, Any]:
    picture = _object(
        {"b64_json": _STRING, "url": _STRING, "revised_prompt": _STRING}, required=["b64_json", "url"]
    )
    return _object(
        {
            "code": {"const": 0},
            "message": {"const": "success"},
            "created": _INTEGER,
            "data": {"type": "array", "minItems": 1, "items": picture},
        },
        required=["code", "message", "created", "data"],
    )
