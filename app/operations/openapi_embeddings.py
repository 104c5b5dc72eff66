"""The JSON schema of the response of POST /v1/embeddings."""

from typing import Any


def embeddings() -> dict[str, Any]:
    """Return the schema."""
    integer = {"type": "integer", "minimum": 0}
    vector = {
        "oneOf": [
            {"type": "array", "items": {"type": "number"}, "minItems": 1},
            {"type": "string", "description": "base64 of numbers as float32, little endian"},
        ]
    }
    item = {
        "type": "object",
        "properties": {"object": {"const": "embedding"}, "index": integer, "embedding": vector},
        "required": ["object", "index", "embedding"],
    }
    properties = {
        "code": {"const": 0},
        "message": {"const": "success"},
        "id": {"type": "string"},
        "object": {"const": "list"},
        "created": integer,
        "model": {"type": "string"},
        "data": {"type": "array", "minItems": 1, "items": item},
        "usage": {
            "type": "object",
            "properties": {"prompt_tokens": integer, "total_tokens": integer},
            "required": ["prompt_tokens", "total_tokens"],
        },
    }
    return {"type": "object", "properties": properties, "required": list(properties)}
