"""The JSON schemas of what the text endpoints answer, for GET /openapi.json."""

from typing import Any

from app.operations.openapi_parts import INTEGER, NULLABLE_STRING, STRING, array, object_of

_STOP_REASON = {
    "type": ["integer", "string", "null"],
    "description": "the stop token or string that has ended the text",
}
_STATUS = {"code": {"const": 0}, "message": {"const": "success"}}


def text_schemas() -> dict[str, Any]:
    """Return the schemas by name."""
    return {
        "ChatCompletion": _chat_completion(),
        "ChatCompletionChunk": _chunk(),
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
        {
            "index": INTEGER,
            "message": message,
            "logprobs": _logprobs(),
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
            "stop_reason": _STOP_REASON,
        },
        required=["index", "message", "finish_reason"],
    )
    return _answer("chat.completion", choice)


def _chunk() -> dict[str, Any]:
    function = object_of({"name": STRING, "arguments": STRING}, required=["arguments"])
    call = object_of(
        {"index": INTEGER, "id": STRING, "type": {"const": "function"}, "function": function},
        required=["index", "function"],
    )
    delta = object_of(
        {
            "role": {"const": "assistant"},
            "content": STRING,
            "reasoning_content": STRING,
            "tool_calls": {"type": "array", "minItems": 1, "maxItems": 1, "items": call},
        },
        required=[],
    )
    choice = object_of(
        {
            "index": INTEGER,
            "delta": delta,
            "logprobs": _logprobs(),
            "stop_reason": _STOP_REASON,
            "finish_reason": {"enum": [None, "stop", "length", "tool_calls"]},
        },
        required=["index", "delta", "finish_reason"],
    )
    return object_of(
        {
            "id": STRING,
            "object": {"const": "chat.completion.chunk"},
            "created": INTEGER,
            "model": STRING,
            "choices": array(choice),
            "usage": {"anyOf": [_usage(), {"type": "null"}]},
            "timings": {
                **object_of(
                    dict.fromkeys(("queued_ms", "first_token_ms", "total_ms"), INTEGER), required=["total_ms"]
                ),
                "description": "of the request, in the last chunk",
            },
        },
        required=["id", "object", "created", "model", "choices"],
    )


def _logprobs() -> dict[str, Any]:
    number = {"type": "number"}
    token = {"token": STRING, "logprob": number, "bytes": array(INTEGER)}
    content = array(object_of({**token, "top_logprobs": array(object_of(token))}))
    return {"anyOf": [object_of({"content": content}), {"type": "null"}]}


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
            "stop_reason": _STOP_REASON,
        }
    )
    return _answer("text_completion", choice)


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an answer with choices and usage."""
    return object_of(
        {
            **_STATUS,
            "id": STRING,
            "object": {"const": kind},
            "created": INTEGER,
            "model": STRING,
            "choices": {"type": "array", "minItems": 1, "items": choice},
            "usage": _usage(),
        },
        required=["code", "message", "created", "model", "choices", "usage"],
    )


def _usage() -> dict[str, Any]:
    counts = ["prompt_tokens", "completion_tokens", "total_tokens"]
    return object_of(
        {
            **dict.fromkeys(counts, INTEGER),
            "prompt_tokens_details": object_of({"cached_tokens": INTEGER}),
            "completion_tokens_details": object_of({"reasoning_tokens": INTEGER}),
        },
        required=counts,
    )
