"""The JSON schemas in GET /openapi.json. Those of requests come from the classes that validate them."""

from typing import Any

from pydantic import BaseModel

from app.chat.schema import ChatCompletionRequest
from app.chat.text_schema import CompletionRequest
from app.chat.tokens_schema import DetokenizeRequest, TokenizeRequest
from app.dispatch.activity import GROWTH, SAMPLE_S
from app.embeddings.schema import EmbeddingRequest
from app.images.schema import ABSENT_AS_ZERO, ImageEditRequest, ImageGenerationRequest
from app.operations.openapi_embeddings import embeddings
from app.operations.openapi_parts import INTEGER, NULLABLE_STRING, STRING, array, object_of
from app.operations.openapi_text import text_schemas
from catalogue import TASKS

REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
_BOOLEAN = {"type": "boolean"}
_NULLABLE_INTEGER = {"type": ["integer", "null"]}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""Pydantic's names, which it leaves in the schema for bounds of a union, and which JSON Schema ignores."""
_NOT_BLANK = r"[^\s\u001c-\u001f\u0085]"
"""A character that str.strip() keeps. It also removes control characters that \\s has not in JSON Schema."""
REQUESTS: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ImageGenerationRequest,
    ImageEditRequest,
)
_SIZE = r"^(auto|[0-9]{1,6}x[0-9]{1,6})?$"


def component_schemas() -> dict[str, Any]:
    """Return all schemas by name, for `#/components/schemas`."""
    schemas = {
        "Error": _error(),
        **text_schemas(),
        "Embeddings": embeddings(),
        "ImagesResponse": _images_response(),
        **_operators_schemas(),
    }
    for model in REQUESTS:
        schemas |= _request_schemas(model)
    for model in (ImageGenerationRequest, ImageEditRequest):
        _allow_absent(schemas[model.__name__]["properties"])
    _add_image_files(schemas["ImageEditRequest"])
    return {name: _json_schema(schema) for name, schema in schemas.items()}


def edit_form() -> dict[str, Any]:
    """Return the schema of the multipart form that the node and OpenAI's clients send."""
    return object_of(
        {
            "image": {**BINARY, "minLength": 1},
            "mask": {**BINARY, "minLength": 1},
            "prompt": {**STRING, "pattern": _NOT_BLANK},
            "model": STRING,
            "n": {**INTEGER, "minimum": 0},
            "size": {**STRING, "pattern": _SIZE},
            "response_format": {"enum": ["", "url", "b64_json"]},
        },
        required=["image", "prompt"],
    )


def ref(name: str) -> dict[str, str]:
    """Return a reference to a component schema."""
    return {"$ref": REF.format(model=name)}


def _request_schemas(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a request class, and those of the classes that it refers to."""
    schema = model.model_json_schema(ref_template=REF)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _allow_absent(properties: dict[str, Any]) -> None:
    """Add what pydantic can't derive: custom validators, and values that count as absent."""
    for name in ABSENT_AS_ZERO:
        properties[name] = {"type": ["integer", "null"], "minimum": 0}
    properties["size"] = {"type": ["string", "null"], "pattern": _SIZE}
    properties["response_format"] = {"enum": [None, "", "url", "b64_json"]}
    properties["prompt"]["pattern"] = _NOT_BLANK


def _add_image_files(schema: dict[str, Any]) -> None:
    """Add the image files of an edit in JSON, which app.images.body reads before the body is validated."""
    one = {**STRING, "minLength": 1, "description": "an http(s) URL, a data: URL or base64"}
    file = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": 1}]}
    schema["properties"]["image"] = file
    schema["properties"]["mask"] = {"anyOf": [file, {"type": "null"}]}
    schema["required"] = [*schema["required"], "image"]


def _json_schema(schema: Any) -> Any:
    """Return a schema of pydantic with JSON Schema's names for bounds."""
    if isinstance(schema, list):
        return [_json_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(name, name): _json_schema(part) for name, part in schema.items()}


def _error() -> dict[str, Any]:
    detail = object_of({"message": STRING, "type": STRING, "param": NULLABLE_STRING, "code": STRING})
    return object_of(
        {
            "code": {**INTEGER, "minimum": 400, "description": "the HTTP status; never 0"},
            "message": STRING,
            "error": detail,
        }
    )


def _operators_schemas() -> dict[str, Any]:
    status = {"code": {"const": 0}, "message": STRING}
    model = {
        **dict.fromkeys(("model", "url", "id", "owned_by"), STRING),
        "object": {"const": "model"},
        "created": INTEGER,
        "task": {"enum": list(TASKS)},
        "endpoints": {"type": "object", "additionalProperties": STRING},
        "max_model_len": {
            "type": ["integer", "null"],
            "description": "tokens of prompt and answer together, or of an input; the least of the ready workers; "
            "null while there is none, and for image models",
        },
        "input_modalities": {
            **array({"enum": ["text", "image"]}),
            "description": "what requests may contain. Of a chat model the workers tell it once they have loaded it",
        },
    }
    worker = {
        **dict.fromkeys(("name", "cid", "model", "host", "last_error"), STRING),
        **dict.fromkeys(("pid", "running", "slots", "steps"), INTEGER),
        "tasks": array(STRING),
        "gpus": array(STRING),
        "state": {
            **STRING,
            "description": "loading, ready, draining, drained or lost; newer versions may have others",
        },
        "registered": {
            "type": ["boolean", "null"],
            "description": "whether the node has the worker in its list; null for tasks that it does not know",
        },
        "kv_cache_usage": {
            "type": ["number", "null"],
            "description": "part of the KV cache that running chats hold, 0 to 1; null without a cache",
        },
        "gpu": {
            **object_of(
                {
                    "memory_used_bytes": INTEGER,
                    "memory_total_bytes": INTEGER,
                    "utilization": {"type": ["number", "null"], "description": "0 to 1"},
                    "temperature_c": {"type": ["integer", "null"]},
                }
            ),
            "type": ["object", "null"],
            "description": "what the driver tells of the GPU; null on the CPU, and while it does not answer",
        },
    }
    details = {
        "redis": {**STRING, "description": "ok, unreachable, or refuses writes: and the reason"},
        "models_without_worker": array(STRING),
        "master_pid": INTEGER,
        "warnings": array(STRING),
    }
    return {
        "Health": object_of({**status, "serves": _BOOLEAN}, required=list(status)),
        "Readiness": object_of(
            {"code": {"enum": [0, 503]}, "message": STRING, **details}, required=["code", "message"]
        ),
        "Version": object_of({"version": STRING}),
        "Model": object_of(status | model),
        "Models": object_of(
            {**status, "project": STRING, "object": {"const": "list"}, "data": array(object_of(model))}
        ),
        "Workers": object_of({**status, "data": array(object_of(worker))}),
        "Drain": object_of({**status, "data": object_of({"name": STRING, "under_drain": _BOOLEAN})}),
        "Activity": object_of(status | _activity()),
    }


def _activity() -> dict[str, Any]:
    times = {
        "type": "object",
        "additionalProperties": INTEGER,
        "description": f"requests by time to first token: by the upper bound of a class in ms, whose lower bound "
        f"is a {GROWTH:g}th of it",
    }
    of_model = object_of({"waiting": INTEGER, "running": INTEGER, "first_token_ms": times})
    sample = object_of({"at": INTEGER, "models": {"type": "object", "additionalProperties": of_model}})
    ended = object_of(
        {
            **dict.fromkeys(("id", "model", "route", "outcome"), STRING),
            **dict.fromkeys(("status", "total_ms"), INTEGER),
            **dict.fromkeys(("queued_ms", "first_token_ms", "images"), _NULLABLE_INTEGER),
            **dict.fromkeys(("prompt_tokens", "completion_tokens"), _NULLABLE_INTEGER),
            "cid": {**NULLABLE_STRING, "description": "the worker that had claimed it"},
            "ended_at": {"type": "number"},
        }
    )
    return {
        "now": {"type": "number", "description": "seconds, by the clock of Redis, as all times here"},
        "cursor": {**STRING, "description": "as `after` of the next call it asks for what is new"},
        "queues": array(object_of({"model": STRING, "waiting": INTEGER, "running": INTEGER})),
        "samples": {
            **array(sample),
            "description": f"{SAMPLE_S} s each from `at` on; numbers of requests are the largest in that time",
        },
        "requests": {**array(ended), "description": "the newest first"},
        "under_drain": {**array(STRING), "description": "names of workers, running or not"},
    }


def _images_response() -> dict[str, Any]:
    image = object_of(
        {"b64_json": STRING, "url": STRING, "revised_prompt": STRING, "seed": INTEGER},
        required=["b64_json", "url"],
    )
    return object_of(
        {
            "code": {"const": 0},
            "message": {"const": "success"},
            "created": INTEGER,
            "data": {"type": "array", "minItems": 1, "items": image},
        },
        required=["code", "message", "created", "data"],
    )
