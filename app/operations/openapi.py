"""GET /openapi.json: the description of the API.

tests/security/test_fuzz.py compares it with the running service: requests that the schemas allow are served,
others are refused, and every response is as declared. What JSON Schema can't express is a 400 that names the
field: a bound that depends on another field, the limits of one model, 1.0 where an integer is required.
"""

from typing import Any

from app.dispatch.activity import CURSOR
from app.http.auth import KEY_HEADERS
from app.operations.openapi_parts import STRING
from app.operations.openapi_schemas import BINARY, component_schemas, edit_form, ref
from catalogue import CHAT, COMPLETIONS_PATH, DETOKENIZE_PATH, EDIT, EMBEDDING, GENERATION, TOKENIZE_PATH
from config import VERSION

_EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "a chunk as JSON, an error, or [DONE] at the end"}
    },
    "required": ["data"],
}
_TASK_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def describe(server_url: str, *, keyed: bool = False) -> dict[str, Any]:
    """Return an OpenAPI 3.1 document. `keyed`: API_KEYS is set."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Model service",
            "version": VERSION,
            "description": "OpenAI's API, with the additions of the network's model API standard. Every "
            "response has X-Request-Id: the client's own if it is a token of at most 128 characters, else ours.",
        },
        "servers": [{"url": server_url}],
        "components": {"schemas": component_schemas()},
        "paths": {**_task_paths(), **_operations_paths()},
    }
    if keyed:
        headers = {name: {"type": "apiKey", "in": "header", "name": name} for name in KEY_HEADERS}
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            **headers,
        }
        document["security"] = [{name: []} for name in document["components"]["securitySchemes"]]
    return document


def _task_paths() -> dict[str, Any]:
    """Return the endpoints that need a worker."""
    images = {"application/json": ref("ImagesResponse")}
    return {
        CHAT.path: {
            "post": _post(
                "Create a chat completion",
                {"application/json": ref("ChatCompletionRequest")},
                {"application/json": ref("ChatCompletion"), "text/event-stream": _EVENT},
            )
        },
        f"{CHAT.path}/{{request_id}}/events": {
            "get": _get(
                "Continue the stream of a chat completion that was begun with X-Resumable",
                {"text/event-stream": _EVENT},
                parameter="request_id",
                headers={"Last-Event-ID": {**STRING, "pattern": "^([0-9]{1,9})?$"}},
                errors=(400, 404, 503),
            )
        },
        COMPLETIONS_PATH: {
            "post": _post(
                "Create a completion of one or more prompts",
                {"application/json": ref("CompletionRequest")},
                {"application/json": ref("Completion"), "text/event-stream": _EVENT},
            )
        },
        TOKENIZE_PATH: {
            "post": _post(
                "Tokenize a text or a chat",
                {"application/json": ref("TokenizeRequest")},
                {"application/json": ref("Tokens")},
            )
        },
        DETOKENIZE_PATH: {
            "post": _post(
                "Turn tokens into text",
                {"application/json": ref("DetokenizeRequest")},
                {"application/json": ref("DetokenizedText")},
            )
        },
        GENERATION.path: {
            "post": _post("Create images", {"application/json": ref("ImageGenerationRequest")}, images)
        },
        EDIT.path: {
            "post": _post(
                "Edit an image",
                {"application/json": ref("ImageEditRequest"), "multipart/form-data": edit_form()},
                images,
            )
        },
        EMBEDDING.path: {
            "post": _post(
                "Create a vector for each input",
                {"application/json": ref("EmbeddingRequest")},
                {"application/json": ref("Embeddings")},
            )
        },
    }


def _operations_paths() -> dict[str, Any]:
    """Return the endpoints that the web process answers by itself."""
    image = {"image/png": {"schema": BINARY}}
    return {
        "/v1/models": {"get": _get("List the models and their endpoints", "Models")},
        "/v1/models/{name}": {"get": _get("Retrieve a model", "Model", parameter="name", errors=(404,))},
        "/v1/workers": {"get": _get("List the workers and their states", "Workers")},
        "/v1/workers/{worker}/drain": {"post": _act("Let a worker finish what it runs and take nothing new")},
        "/v1/workers/{worker}/resume": {"post": _act("Let a worker serve again")},
        "/v1/activity": {
            "get": _get(
                "List the queues, the times to first token and the ended requests of the last minutes",
                "Activity",
                query={"after": {**STRING, "pattern": f"^{CURSOR}$"}},
                errors=(400, 403, 503),
            )
        },
        "/v1/images/files/{name}": {
            "get": _get("Retrieve a finished image", image, parameter="name", errors=(404, 503), public=True)
        },
        "/healthz": {
            "get": _get(
                "Check that this process runs, and whether it serves a model",
                "Health",
                query=dict.fromkeys(("namespace", "model"), STRING),
                public=True,
            )
        },
        "/readyz": {
            "get": _get(
                "Check that every model has a worker", "Readiness", also={503: "Readiness"}, public=True
            )
        },
        "/health": {"get": _probe("Check that this process can serve a model")},
        "/ping": {"get": _probe("The same as /health")},
        "/version": {"get": _get("Retrieve the version of the service", "Version", public=True)},
        "/metrics": {"get": _get("Retrieve Prometheus metrics", {"text/plain": {"schema": STRING}})},
        "/openapi.json": {
            "get": _get("Retrieve this document", {"application/json": {"schema": {"type": "object"}}})
        },
    }


def _post(summary: str, bodies: dict[str, Any], responses: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in bodies.items()},
        },
        "responses": {
            "200": {
                "description": "the response, or its stream",
                "content": {kind: {"schema": schema} for kind, schema in responses.items()},
            },
            **_errors(*_TASK_ERRORS),
        },
    }


def _get(
    summary: str,
    content: str | dict[str, Any],
    parameter: str | None = None,
    query: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
    errors: tuple[int, ...] = (),
    also: dict[int, str] | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """Return an operation.

    `content`: a schema's name, or content by type; `parameter`: in the path; `query` and `headers`: schemas of optional
    parameters; `also`: schemas by status.
    """
    content = _json(content) if isinstance(content, str) else content
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **_errors(*errors)},
    }
    if public:
        operation["security"] = []
    else:
        operation["responses"] |= _errors(401)
    for status, name in (also or {}).items():
        operation["responses"][str(status)] = {"description": summary, "content": _json(name)}
    path = [{"name": parameter, "in": "path", "required": True, "schema": STRING}] if parameter else []
    if parameters := [*path, *_optional("query", query or {}), *_optional("header", headers or {})]:
        operation["parameters"] = parameters
    return operation


def _optional(place: str, schemas: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "in": place, "schema": schema} for name, schema in schemas.items()]


def _act(summary: str) -> dict[str, Any]:
    """Return an operation of operators on a worker, by its name or cid. Its body is an empty object."""
    operation = _get(summary, "Drain", parameter="worker", errors=(400, 403, 404, 408, 413, 415, 503))
    body = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    return operation | {"requestBody": body}


def _probe(summary: str) -> dict[str, Any]:
    """Return an operation without a key, whose status is the answer: its responses have no body."""
    responses = {"200": {"description": "yes"}, "503": {"description": "no"}}
    return {"summary": summary, "responses": responses, "security": []}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": "error", "content": _json("Error")} for status in statuses}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": ref(name)}}
