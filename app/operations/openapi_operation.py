"""Operations of GET /openapi.json: what their requests, responses and errors have in common."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from app.operations.openapi_examples import ANSWERS
from app.operations.openapi_parts import INTEGER, STRING
from app.operations.openapi_schemas import ref

TASK_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
EVENT = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "a chunk as JSON (of a chat: ChatCompletionChunk), an error, or [DONE] at the end",
        }
    },
    "required": ["data"],
}
IMAGE_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "the type of the event"},
        "data": {"type": "string", "description": "an ImageStreamEvent as JSON, or an error"},
    },
    "required": ["event", "data"],
}
HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "the client's own id if it is a token of at most 128 characters, else ours",
        "required": True,
        "schema": STRING,
    },
    "Retry-After": {"description": "seconds after which another attempt may succeed", "schema": INTEGER},
    "X-Should-Retry": {
        "description": "false: another attempt would fail too, or harm others",
        "schema": {"enum": ["false"]},
    },
    "X-Ignored-Params": {"description": "fields of the body that have no effect", "schema": STRING},
    "X-Queued-Ms": {"description": "from the validation of a plain request to its claim", "schema": INTEGER},
    "X-First-Token-Ms": {"description": "to the first token", "schema": INTEGER},
    "X-Total-Ms": {"description": "to the complete answer", "schema": INTEGER},
}
"""Of responses, by name."""
_OF_TASKS = ("X-Ignored-Params", "X-Queued-Ms", "X-First-Token-Ms", "X-Total-Ms")


class Name(NamedTuple):
    """How clients made from the document, and viewers, call an operation.

    `tag`: the group that it belongs to.
    """

    operation: str
    tag: str
    summary: str


def task(
    name: Name,
    bodies: Mapping[str, dict[str, Any]],
    answer: str,
    examples: Mapping[str, Any],
    *,
    streams: Mapping[str, Any] | None = None,
    headers: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the operation of an endpoint that needs a worker.

    `bodies`: schemas by content type; `answer`: the name of a schema; `examples`: bodies as JSON by their
    summary; `streams`: the schema of the events, if it has any; `headers`: parameters, all optional.
    """
    content: dict[str, dict[str, Any]] = {kind: {"schema": schema} for kind, schema in bodies.items()}
    content["application/json"]["examples"] = {
        summary: {"summary": summary, "value": value} for summary, value in examples.items()
    }
    found = _json(answer) | ({"text/event-stream": {"schema": streams}} if streams else {})
    operation = _named(name) | {
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": response("the response, or its stream", found, _OF_TASKS),
            **_errors(*TASK_ERRORS),
        },
    }
    return _with_parameters(operation, header=headers)


def get(
    name: Name,
    content: str | dict[str, Any],
    *,
    path: str = "",
    query: Mapping[str, dict[str, Any]] | None = None,
    headers: Mapping[str, dict[str, Any]] | None = None,
    errors: tuple[int, ...] = (),
    also: Mapping[int, str] | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """Return the operation of an endpoint that is read.

    `content`: a schema's name, or content by type; `path`: the parameter in the path; `query` and `headers`:
    optional parameters; `also`: schemas by status; `public`: no key is needed.
    """
    content = _json(content) if isinstance(content, str) else content
    responses = {"200": response(name.summary, content), **_errors(*errors, *(() if public else (401,)))}
    for status, schema in (also or {}).items():
        responses[str(status)] = response(name.summary, _json(schema))
    operation = _named(name) | {"responses": responses} | ({"security": []} if public else {})
    return _with_parameters(operation, path, query, headers)


def act(name: Name) -> dict[str, Any]:
    """Return an operation of operators on a worker, by its name or cid. Its body is an empty object."""
    operation = get(name, "Drain", path="worker", errors=(400, 403, 404, 408, 413, 415, 503))
    body = {"schema": {"type": "object"}, "example": {}}
    return operation | {"requestBody": {"required": True, "content": {"application/json": body}}}


def probe(name: Name) -> dict[str, Any]:
    """Return an operation without a key, whose status is the answer: its responses have no body."""
    responses = {"200": response("yes"), "503": response("no")}
    return _named(name) | {"responses": responses, "security": []}


def response(
    description: str, content: dict[str, Any] | None = None, headers: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a response. `headers`: names of HEADERS beside X-Request-Id."""
    names = ("X-Request-Id", *headers)
    found = {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}}
    return {"description": description, **found, **({"content": content} if content else {})}


def _named(name: Name) -> dict[str, Any]:
    return {"operationId": name.operation, "tags": [name.tag], "summary": name.summary}


def _with_parameters(
    operation: dict[str, Any],
    path: str = "",
    query: Mapping[str, dict[str, Any]] | None = None,
    header: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    found = [{"name": path, "in": "path", "required": True, "schema": STRING}] if path else []
    for place, schemas in (("query", query), ("header", header)):
        for name, schema in (schemas or {}).items():
            # viewers show that of the parameter, and not that of its schema
            text = {"description": schema["description"]} if "description" in schema else {}
            found.append({"name": name, "in": place, "schema": schema} | text)
    return operation | ({"parameters": found} if found else {})


def _errors(*statuses: int) -> dict[str, Any]:
    headers = {429: ("Retry-After",), 500: ("X-Should-Retry",), 503: ("Retry-After", "X-Should-Retry")}
    return {
        str(status): response("error", _json("Error"), headers.get(status, ()))
        for status in sorted(set(statuses))
    }


def _json(name: str) -> dict[str, Any]:
    example = {"example": ANSWERS[name]} if name in ANSWERS else {}
    return {"application/json": {"schema": ref(name), **example}}
