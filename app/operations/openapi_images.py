"""The JSON schemas of what the image endpoints answer, for GET /openapi.json."""

from typing import Any

from app.operations.openapi_parts import INTEGER, STRING, object_of

_TIMINGS = dict.fromkeys(("queued_ms", "total_ms"), INTEGER)


def images_response() -> dict[str, Any]:
    """Return the schema of a plain answer."""
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


def image_stream_event() -> dict[str, Any]:
    """Return the schema of the data of an event in a stream, but for errors."""
    types = [
        f"{kind}.{what}"
        for kind in ("image_generation", "image_edit")
        for what in ("partial_image", "completed")
    ]
    usage = object_of(
        {
            **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), INTEGER),
            "input_tokens_details": object_of(dict.fromkeys(("image_tokens", "text_tokens"), INTEGER)),
        }
    )
    common = {
        "type": {"enum": types, "description": "the same as the event's"},
        "b64_json": {**STRING, "description": "the file of the image"},
        "created_at": INTEGER,
        "size": {**STRING, "description": "width and height in pixels, such as 1024x1024"},
        "quality": {"const": "auto"},
        "background": {"const": "opaque"},
        "output_format": {"enum": ["png", "jpeg"], "description": "png; previews are jpeg"},
        "image_index": {**INTEGER, "description": "which of the n images it is"},
    }
    return object_of(
        {
            **common,
            "partial_image_index": {**INTEGER, "description": "of a preview: its number"},
            "seed": {**INTEGER, "description": "of a finished image, as the fields below"},
            "usage": {**usage, "description": "zeros: images are not counted in tokens"},
            "timings": {
                **object_of(_TIMINGS, required=["total_ms"]),
                "description": "of the request, with its last image",
            },
        },
        required=list(common),
    )
