"""The JSON schemas in GET /openapi.json. Those of requests come from the classes that validate them."""

from typing import Any

from pydantic import BaseModel

from app.chat.schema import ChatCompletionRequest
from app.chat.text_schema import CompletionRequest
from app.chat.tokens_schema import DetokenizeRequest, TokenizeRequest
from app.embeddings.schema import EmbeddingRequest
from app.images.schema import (
    ABSENT_AS_ZERO,
    MAX_PARTIAL_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    state_rules_of_streams,
)
from app.operations.openapi_embeddings import embeddings
from app.operations.openapi_images import image_stream_event, images_response
from app.operations.openapi_operators import operators_schemas
from app.operations.openapi_parts import INTEGER, NULLABLE_STRING, STRING, object_of
from app.operations.openapi_text import text_schemas

REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
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
        "ImagesResponse": images_response(),
        "ImageStreamEvent": image_stream_event(),
        **operators_schemas(),
    }
    for model in REQUESTS:
        schemas |= _request_schemas(model)
    for model in (ImageGenerationRequest, ImageEditRequest):
        _allow_absent(schemas[model.__name__]["properties"])
    _add_image_files(schemas["ImageGenerationRequest"], required=False)
    _add_image_files(schemas["ImageEditRequest"], required=True)
    return {name: _json_schema(schema) for name, schema in schemas.items()}


def edit_form() -> dict[str, Any]:
    """Return the schema of the multipart form that the node and OpenAI's clients send."""
    form = object_of(
        {
            "image": {**BINARY, "minLength": 1},
            "mask": {**BINARY, "minLength": 1},
            "prompt": {**STRING, "pattern": _NOT_BLANK},
            "model": STRING,
            "n": {**INTEGER, "minimum": 0},
            "size": {**STRING, "pattern": _SIZE},
            "response_format": {"enum": ["", "url", "b64_json"]},
            "stream": {"type": "boolean"},
            "partial_images": {**INTEGER, "minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
        },
        required=["image", "prompt"],
    )
    state_rules_of_streams(form)
    return form


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


def _add_image_files(schema: dict[str, Any], *, required: bool) -> None:
    """Add the image files of an edit in JSON, which app.images.body reads before the body is validated.

    A generation with an image is an edit, too.
    """
    one = {**STRING, "minLength": 1, "description": "an http(s) URL, a data: URL or base64"}
    file = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": 1}]}
    absent = {"anyOf": [file, {"type": "null"}]}
    properties: dict[str, Any] = schema["properties"]
    properties["mask"] = absent
    properties["image"] = file if required else {**absent, "description": "makes the request an edit"}
    if required:
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
