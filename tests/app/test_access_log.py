"""The line that the web process logs of each request."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from app import create_app
from app.http.access_log import Access, log_accesses
from catalogue import Catalogue
from config import Settings
from logs import Entry

CATALOGUE = Catalogue.model_validate(
    {"project": "Test", "models": [{"name": "chat", "tasks": ["chat"], "weights": "echo:"}]}
)
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client() -> FlaskClient:
    settings = Settings(bind="127.0.0.1:1088", node_url="", redis_url="redis://127.0.0.1:1/0")
    return create_app(settings, CATALOGUE).test_client()


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found: list[Any] = [record.msg for record in caplog.records if record.name == "access"]
    return [entry.fields for entry in found if isinstance(entry, Entry) and entry.name == "request"]


def test_a_request_is_one_line(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = client.get("/v1/models?key=hidden", headers={"X-Request-Id": "mine"}, buffered=True)
    assert answer.status_code == 200
    (found,) = entries(caplog)
    assert found.pop("request_id").startswith("req-") and found.pop("seconds") >= 0
    assert found == {
        "method": "GET",
        "route": "/v1/models",
        "status": 200,
        "outcome": "completed",
        "client_request_id": "mine",
    }


def test_the_code_of_an_error_is_the_outcome(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = client.post("/v1/chat/completions", json={"model": "chat", "messages": HI}, buffered=True)
    assert answer.status_code == 503
    (found,) = entries(caplog)
    assert (found["status"], found["outcome"], found["model"]) == (503, "queue_unavailable", "chat")
    assert found["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("hidden", "/v1/models", None),
        ("GET", "/hidden/path", None),
        ("GET", "/v1/models/hidden", None),
        ("GET", "/v1/images/files/hidden", None),
        ("POST", "/v1/chat/completions", {"model": "hidden", "messages": HI}),
        ("POST", "/v1/chat/completions", {"model": "chat", "messages": "hidden"}),
    ],
)
def test_what_a_client_sends_is_not_in_the_log(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any
) -> None:
    caplog.set_level(logging.INFO)
    headers = {"X-Request-Id": "hidden id", "User-Agent": "hidden"}
    assert client.open(path, method=method, json=body, headers=headers, buffered=True).status_code >= 400
    assert len(entries(caplog)) == 1
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health", "/ping", "/metrics", "/v1/workers"])
def test_checks_and_scrapes_are_logged_for_debugging_only(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level(logging.INFO)
    client.get(path, buffered=True)
    assert not entries(caplog)
    caplog.set_level(logging.DEBUG)
    client.get(path, buffered=True)
    assert len(entries(caplog)) == 1


class Body:
    closed = False

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"x"])

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("failure", "known", "outcome"),
    [
        (None, None, "completed"),
        (BrokenPipeError(), None, "cancelled"),
        (TimeoutError(), None, "cancelled"),
        (ValueError("hidden"), None, "internal_error"),
        (BrokenPipeError(), "worker_lost", "worker_lost"),
    ],
)
def test_a_response_that_the_client_did_not_take_says_so(
    caplog: pytest.LogCaptureFixture, failure: Exception | None, known: str | None, outcome: str
) -> None:
    """A server closes the body of a response also when writing it has failed."""
    caplog.set_level(logging.INFO)
    body = Body()

    def app(environ: dict[str, Any], start_response: Any) -> Body:
        access: Access = environ["modelservice.access"]
        access.code = known
        return body

    response: Any = log_accesses(app, lambda access: None)({"REQUEST_METHOD": "GET"}, None)
    assert list(response) == [b"x"] and not entries(caplog), "the line comes at the end"
    try:
        if failure is not None:
            raise failure
    except Exception:
        response.close()
    else:
        response.close()
    assert body.closed
    assert [found["outcome"] for found in entries(caplog)] == [outcome]
    assert "hidden" not in caplog.text
