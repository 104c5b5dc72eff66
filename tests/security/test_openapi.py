"""The examples of /openapi.json against the running service: it answers each, as the schemas and examples
say."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.operations.openapi_examples import requests
from tests.app.test_openapi import MODELS
from tests.deployment import Deployment

EXAMPLES = [
    (path, summary, body) for path, bodies in requests(MODELS).items() for summary, body in bodies.items()
]


@pytest.fixture(scope="module")
def document(echo: Deployment) -> Any:
    return echo.get("/openapi.json")[1]


def closed(schema: Any) -> Any:
    """The schema without fields that it does not declare."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **found} if "properties" in schema else found


def validator(document: Any, schema: dict[str, Any]) -> Draft202012Validator:
    """Refuses what is not as declared, or not declared."""
    return Draft202012Validator({**closed(schema), "components": closed(document["components"])})


def chunks(stream: bytes) -> Iterator[Any]:
    """The chunks of a complete stream."""
    *data, done, end = stream.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    for each in data:
        yield json.loads(each.removeprefix(b"data: "))


def image_events(stream: bytes) -> Iterator[Any]:
    """The data of the events of a stream."""
    *events, end = stream.split(b"\n\n")
    assert end == b""
    for each in events:
        if not each.startswith(b":"):
            name, data = each.split(b"\n")
            found = json.loads(data.removeprefix(b"data: "))
            assert name.decode() == f"event: {found['type']}"
            yield found


@pytest.mark.parametrize(
    ("path", "summary", "body"), EXAMPLES, ids=[f"{path}: {summary}" for path, summary, _ in EXAMPLES]
)
def test_an_example_is_answered_as_declared(
    echo: Deployment, document: Any, path: str, summary: str, body: dict[str, Any]
) -> None:
    operation = document["paths"][path]["post"]
    given = operation["requestBody"]["content"]["application/json"]["examples"]
    assert given[summary] == {"summary": summary, "value": body}

    declared = operation["responses"]["200"]
    response, connection = echo.request(
        "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with closing(connection):
        answer = response.read()
    assert response.status == 200, answer
    ours = {name.lower() for name, _ in response.getheaders() if name.startswith("X-")} - {
        "x-accel-buffering"
    }
    assert "x-request-id" in ours
    assert ours <= {name.lower() for name in declared["headers"]}

    if body.get("stream") and "images" in path:
        events = list(image_events(answer))
        for each in events:
            validator(document, document["components"]["schemas"]["ImageStreamEvent"]).validate(each)
        assert [each.get("partial_image_index") for each in events] == [*range(body["partial_images"]), None]
        return
    if body.get("stream"):
        found = list(chunks(answer))
        assert found[-1]["usage"]["completion_tokens"] and found[-1]["timings"]
        for chunk in found:
            validator(document, document["components"]["schemas"]["ChatCompletionChunk"]).validate(chunk)
        return
    content = declared["content"]["application/json"]
    validator(document, content["schema"]).validate(json.loads(answer))
    assert_same_fields(content["example"], json.loads(answer))


def assert_same_fields(example: Any, answer: Any) -> None:
    """Check that both have the same fields, at every depth."""
    if isinstance(example, dict) and isinstance(answer, dict):
        assert example.keys() == answer.keys()
        for name in example:
            assert_same_fields(example[name], answer[name])
    elif isinstance(example, list) and isinstance(answer, list) and example and answer:
        assert_same_fields(example[0], answer[0])


GETS = ["/v1/models", "/v1/models/echo", "/v1/workers", "/v1/activity", "/healthz", "/readyz", "/version"]


@pytest.mark.parametrize("path", GETS)
def test_what_is_read_has_no_field_that_is_not_declared(echo: Deployment, document: Any, path: str) -> None:
    operation = document["paths"][path.replace("/echo", "/{name}")]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    status, answer = echo.get(path)
    assert status == 200
    validator(document, schema).validate(answer)


def test_an_error_is_as_its_example(echo: Deployment, document: Any) -> None:
    declared = document["paths"]["/v1/models/{name}"]["get"]["responses"]["404"]["content"][
        "application/json"
    ]
    _, answer = echo.get("/v1/models/x")
    validator(document, declared["schema"]).validate(answer)
    assert_same_fields(declared["example"], answer)


def test_the_example_of_the_version_is_the_version(echo: Deployment, document: Any) -> None:
    declared = document["paths"]["/version"]["get"]["responses"]["200"]["content"]["application/json"]
    assert echo.get("/version")[1] == declared["example"]
