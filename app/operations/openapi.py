"""GET /openapi.json: the description of the API.

tests/security/test_fuzz.py compares it with the running service: requests that the schemas allow are served,
others are refused, and every response is as declared. What JSON Schema can't express is a 400 that names the
field: a bound that depends on another field, the limits of one model, 1.0 where an integer is required.
"""

from collections.abc import Mapping
from typing import Any

from app.dispatch.activity import CURSOR
from app.http.auth import KEY_HEADERS
from app.operations.openapi_examples import requests
from app.operations.openapi_operation import EVENT, HEADERS, IMAGE_EVENT, Name, act, get, probe, task
from app.operations.openapi_parts import STRING
from app.operations.openapi_schemas import BINARY, component_schemas, edit_form, ref
from catalogue import CHAT, COMPLETION, DETOKENIZE_PATH, EDIT, EMBEDDING, GENERATION, TOKENIZE_PATH
from config import VERSION

_TAGS = {
    "Text": "Chats, completions and tokens",
    "Images": "Generations and edits",
    "Embeddings": "Vectors of texts",
    "Models": "What is served",
    "Operations": "For operators, monitoring and balancers",
}


def describe(server_url: str, models: Mapping[str, str], *, keyed: bool = False) -> dict[str, Any]:
    """Return an OpenAPI 3.1 document.

    `models`: by task, a model for the examples. `keyed`: API_KEYS is set.
    """
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Model service",
            "version": VERSION,
            "description": "OpenAI's API, with the additions of the network's model API standard.",
        },
        "servers": [{"url": server_url}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "components": {"schemas": component_schemas(), "headers": HEADERS},
        "paths": {
            **_chat_paths(models),
            **_completion_paths(models),
            **_vector_and_image_paths(models),
            **_model_and_worker_paths(),
            **_process_paths(),
        },
    }
    if keyed:
        headers = {name: {"type": "apiKey", "in": "header", "name": name} for name in KEY_HEADERS}
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            **headers,
        }
        document["security"] = [{name: []} for name in document["components"]["securitySchemes"]]
    return document


def _chat_paths(models: Mapping[str, str]) -> dict[str, Any]:
    """Return the endpoints of chats."""
    examples = requests(models)
    resumable = {**STRING, "description": "true: the stream can be resumed; other values are ignored"}
    last_id = {
        **STRING,
        "pattern": "^([0-9]{1,9})?$",
        "description": "the id of the last chunk that has arrived",
    }
    return {
        CHAT.path: {
            "post": task(
                Name("createChatCompletion", "Text", "Create a chat completion"),
                {"application/json": ref("ChatCompletionRequest")},
                "ChatCompletion",
                examples[CHAT.path],
                streams=EVENT,
                headers={"X-Resumable": resumable},
            )
        },
        f"{CHAT.path}/{{request_id}}/events": {
            "get": get(
                Name(
                    "resumeChatCompletion",
                    "Text",
                    "Continue the stream of a chat completion that was begun with X-Resumable",
                ),
                {"text/event-stream": {"schema": EVENT}},
                path="request_id",
                headers={"Last-Event-ID": last_id},
                errors=(400, 404, 503),
            )
        },
    }


def _completion_paths(models: Mapping[str, str]) -> dict[str, Any]:
    """Return the endpoints of models for texts that take plain prompts or tokens."""
    examples = requests(models)
    return {
        COMPLETION.path: {
            "post": task(
                Name("createCompletion", "Text", "Create a completion of one or more prompts"),
                {"application/json": ref("CompletionRequest")},
                "Completion",
                examples[COMPLETION.path],
                streams=EVENT,
            )
        },
        TOKENIZE_PATH: {
            "post": task(
                Name("tokenize", "Text", "Tokenize a text or a chat"),
                {"application/json": ref("TokenizeRequest")},
                "Tokens",
                examples[TOKENIZE_PATH],
            )
        },
        DETOKENIZE_PATH: {
            "post": task(
                Name("detokenize", "Text", "Turn tokens into text"),
                {"application/json": ref("DetokenizeRequest")},
                "DetokenizedText",
                examples[DETOKENIZE_PATH],
            )
        },
    }


def _vector_and_image_paths(models: Mapping[str, str]) -> dict[str, Any]:
    """Return the endpoints of image and embedding models."""
    examples = requests(models)
    return {
        GENERATION.path: {
            "post": task(
                Name("createImage", "Images", "Create images"),
                {"application/json": ref("ImageGenerationRequest")},
                "ImagesResponse",
                examples[GENERATION.path],
                streams=IMAGE_EVENT,
            )
        },
        EDIT.path: {
            "post": task(
                Name("createImageEdit", "Images", "Edit an image"),
                {"application/json": ref("ImageEditRequest"), "multipart/form-data": edit_form()},
                "ImagesResponse",
                examples[EDIT.path],
                streams=IMAGE_EVENT,
            )
        },
        EMBEDDING.path: {
            "post": task(
                Name("createEmbedding", "Embeddings", "Create a vector for each input"),
                {"application/json": ref("EmbeddingRequest")},
                "Embeddings",
                examples[EMBEDDING.path],
            )
        },
        "/v1/images/files/{name}": {
            "get": get(
                Name("retrieveImageFile", "Images", "Retrieve a finished image"),
                {"image/png": {"schema": BINARY}},
                path="name",
                errors=(404, 503),
                public=True,
            )
        },
    }


def _operations(operation: str, summary: str) -> Name:
    return Name(operation, "Operations", summary)


def _model_and_worker_paths() -> dict[str, Any]:
    """Return the endpoints that list what is served, and those of operators."""
    models = Name("listModels", "Models", "List the models and their endpoints")
    model = Name("retrieveModel", "Models", "Retrieve a model")
    activity = "List the queues, the times to first token and the ended requests of the last minutes"
    return {
        "/v1/models": {"get": get(models, "Models")},
        "/v1/models/{name}": {"get": get(model, "Model", path="name", errors=(404,))},
        "/v1/workers": {
            "get": get(_operations("listWorkers", "List the workers and their states"), "Workers")
        },
        "/v1/workers/{worker}/drain": {
            "post": act(_operations("drainWorker", "Let a worker finish what it runs and take nothing new"))
        },
        "/v1/workers/{worker}/resume": {"post": act(_operations("resumeWorker", "Let a worker serve again"))},
        "/v1/activity": {
            "get": get(
                _operations("listActivity", activity),
                "Activity",
                query={"after": {**STRING, "pattern": f"^{CURSOR}$"}},
                errors=(400, 403, 503),
            )
        },
    }


def _process_paths() -> dict[str, Any]:
    """Return the endpoints that tell of the web process itself."""
    return {
        "/healthz": {
            "get": get(
                _operations("checkProcess", "Check that this process runs, and whether it serves a model"),
                "Health",
                query=dict.fromkeys(("namespace", "model"), STRING),
                public=True,
            )
        },
        "/readyz": {
            "get": get(
                _operations("checkReadiness", "Check that every model has a worker"),
                "Readiness",
                also={503: "Readiness"},
                public=True,
            )
        },
        "/health": {"get": probe(_operations("checkHealth", "Check that this process can serve a model"))},
        "/ping": {"get": probe(_operations("ping", "The same as /health"))},
        "/version": {
            "get": get(
                _operations("retrieveVersion", "Retrieve the version of the service"), "Version", public=True
            )
        },
        "/metrics": {
            "get": get(
                _operations("retrieveMetrics", "Retrieve Prometheus metrics"),
                {"text/plain": {"schema": STRING}},
            )
        },
        "/openapi.json": {
            "get": get(
                _operations("retrieveDescription", "Retrieve this document"),
                {"application/json": {"schema": {"type": "object"}}},
            )
        },
    }
