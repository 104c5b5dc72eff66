"""Examples of GET /openapi.json.

A test sends those of requests to a service, and compares its answers with ours.
"""

from collections.abc import Mapping
from typing import Any

from catalogue import CHAT, COMPLETION, DETOKENIZE_PATH, EDIT, EMBEDDING, GENERATION, TOKENIZE_PATH
from config import VERSION

_RED = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGP4z8CAFTEMLQkQAABzzT/BAhd0vAAAAABJRU5ErkJggg=="
_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def requests(models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return bodies in JSON by path and by summary.

    `models`: a model of each task; one without any gets a made-up name.
    """
    chat = {"model": models.get(CHAT.name, "chat-model")}
    text = {"model": models.get(CHAT.name) or models.get(COMPLETION.name, "text-model")}
    image = {"model": models.get(GENERATION.name, "image-model")}
    edit = {"model": models.get(EDIT.name, "image-model")}
    embedding = {"model": models.get(EMBEDDING.name, "embedding-model")}
    return {
        CHAT.path: _chats(chat),
        **_prompts(text, chat),
        GENERATION.path: _images(image),
        EDIT.path: _edits(edit),
        EMBEDDING.path: {
            "A text": {**embedding, "input": "Hello"},
            "Texts": {**embedding, "input": ["Hello", "Good morning"]},
        },
    }


def _chats(model: dict[str, Any]) -> dict[str, Any]:
    question = _ask(model, "What is the capital of France?")
    by_schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}
    return {
        "A question": question,
        "A stream with usage": {**question, "stream": True, "stream_options": {"include_usage": True}},
        "JSON by a schema": {**_ask(model, "Ada is 36 years old."), "response_format": by_schema},
        "A tool": {**_ask(model, "How is the weather in Oslo?"), "tools": [_WEATHER]},
    }


def _ask(model: dict[str, Any], text: str) -> dict[str, Any]:
    return {**model, "messages": [{"role": "user", "content": text}], "max_tokens": 100}


def _prompts(model: dict[str, Any], chat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    score = {"prompt": "The sky is blue", "max_tokens": 0, "echo": True, "logprobs": 1}
    return {
        COMPLETION.path: {
            "A text": {**model, "prompt": "Once upon a time", "max_tokens": 50},
            "The score of a prompt": {**model, **score},
        },
        TOKENIZE_PATH: {
            "A text": {**model, "prompt": "Hello"},
            "A chat": {**chat, "messages": [{"role": "user", "content": "Hello"}]},
        },
        DETOKENIZE_PATH: {"Tokens": {**model, "tokens": [72, 105]}},
    }


def _images(model: dict[str, Any]) -> dict[str, Any]:
    image = {**model, "prompt": "a red circle on a white ground"}
    return {
        "An image": image,
        "The same image again": {**image, "seed": 7, "response_format": "b64_json"},
        "A stream with previews": {**image, "stream": True, "partial_images": 2},
    }


def _edits(model: dict[str, Any]) -> dict[str, Any]:
    edit = {**model, "prompt": "make it blue", "image": _RED}
    return {
        "An image in the body": edit,
        "A stream with a preview": {**edit, "stream": True, "partial_images": 1},
    }


_SUCCESS = {"code": 0, "message": "success"}
_USAGE = {
    "prompt_tokens": 14,
    "completion_tokens": 8,
    "total_tokens": 22,
    "prompt_tokens_details": {"cached_tokens": 0},
}

ANSWERS: dict[str, dict[str, Any]] = {
    "Error": {
        "code": 404,
        "message": "model 'x' does not exist",
        "error": {
            "message": "model 'x' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
    },
    "ChatCompletion": {
        **_SUCCESS,
        "id": "cmpl-4f0c6a1de2b74f0f9b1c6d8e7a5b3c21",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "chat-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris."},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": _USAGE,
    },
    "Completion": {
        **_SUCCESS,
        "id": "cmpl-9d2e7b0c1f3a4d5e8c6b7a9f0e1d2c3b",
        "object": "text_completion",
        "created": 1767225600,
        "model": "chat-model",
        "choices": [
            {
                "index": 0,
                "text": ", there was a fox.",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": _USAGE,
    },
    "Tokens": {**_SUCCESS, "count": 2, "max_model_len": 8192, "tokens": [9707, 0], "token_strs": None},
    "DetokenizedText": {**_SUCCESS, "prompt": "Hi"},
    "ImagesResponse": {
        **_SUCCESS,
        "created": 1767225600,
        "data": [
            {
                "b64_json": "",
                "url": "https://images.example.org/v1/images/files/Xw3…",
                "revised_prompt": "a red circle on a white ground",
                "seed": 7,
            }
        ],
    },
    "Embeddings": {
        **_SUCCESS,
        "id": "embd-1b2c3d4e5f60718293a4b5c6d7e8f901",
        "object": "list",
        "created": 1767225600,
        "model": "embedding-model",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2, 0.3]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    },
    "Version": {"version": VERSION},
}
"""Of responses, by the name of their schema."""
