"""The JSON schemas of what the text endpoints answer, for GET /openapi.json."""

from typing import Any

from app.operations.openapi_parts import INTEGER, NULLABLE_STRING, STRING, array, object_of

_STATUS = {"code": {"const": 0}, "message": {"const": "success"}}


def text_schemas() -> dict[str, Any]:
    """Return the schemas by name."""
    return {
        "ChatCompletion": _chat_completion(),
        "Completion": _completion(),
        "Tokens": object_of(
            {
                **_STATUS,
                "count": INTEGER,
                "max_model_len": INTEGER,
                "tokens": array(INTEGER),
                "token_strs": {"type": ["array", "null"], "items": STRING},
            }
        ),
        "DetokenizedText": object_of({**_STATUS, "prompt": STRING}),
    }


def _chat_completion() -> dict[str, Any]:
    function = object_of({"name": STRING, "arguments": STRING})
    call = object_of({"id": STRING, "type": {"const": "function"}, "function": function})
    message = object_of(
        {
            "role": STRING,
            "content": {**NULLABLE_STRING, "description": "null beside tool_calls if there is no text"},
            "reasoning_content": STRING,
            "tool_calls": {"type": "array", "minItems": 1, "items": call},
        },
        required=["role", "content"],
    )
    choice = object_of(
        {"index": INTEGER, "message": message, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}},
        required=["index", "message", "finish_reason"],
    )
    return _answer("chat.completion", choice)


def _completion() -> dict[str, Any]:
    number = {"type": ["number", "null"]}
    top = {"type": ["object", "null"], "additionalProperties": {"type": "number"}}
    logprobs = {
        "type": ["object", "null"],
        "properties": {
            "tokens": array(STRING),
            "token_logprobs": array(number),
            "top_logprobs": array(top),
            "text_offset": array(INTEGER),
        },
        "required": ["tokens", "token_logprobs", "top_logprobs", "text_offset"],
    }
    choice = object_of(
        {
            "index": INTEGER,
            "text": STRING,
            "logprobs": logprobs,
            "finish_reason": {"enum": ["stop", "length"]},
        }
    )
    return _answer("text_completion", choice)


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an answer with choices and usage."""
    counts = ["prompt_tokens", "completion_tokens", "total_tokens"]
    usage = object_of(
        {
            **dict.fromkeys(counts, INTEGER),
            "prompt_tokens_details": object_of({"cached_tokens": INTEGER}),
            "completion_tokens_details": object_of({"reasoning_tokens": INTEGER}),
        },
        required=counts,
    )
    return object_of(
        {
            **_STATUS,
            "id": STRING,
            "object": {"const": kind},
            "created": INTEGER,
            "model": STRING,
            "choices": {"type": "array", "minItems": 1, "items": choice},
            "usage": usage,
        },
        required=["code", "message", "created", "model", "choices", "usage"],
    )
