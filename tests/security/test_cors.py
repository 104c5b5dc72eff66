"""CORS_ORIGINS: what a browser gets for pages of listed origins, of others, and at the node's listener."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import EXIT_CONFIGURATION
from tests.deployment import Deployment, free_port
from tests.security.conftest import CATALOGUE, HI, Answer, KeyedDeployment, ask, check_error_body, converse

KEY = "sk-cors"
ORIGIN, OTHER_ORIGIN = "https://app.example.org", "http://[::1]:3000"
CHAT = "/v1/chat/completions"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}
UNLISTED = [
    "https://evil.example",
    "null",
    f"{ORIGIN}.evil.example",
    f"{ORIGIN}:8443",
    "http://app.example.org",
    "",
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedDeployment]:
    """A deployment with a key and two origins. Tests must leave it as it is."""
    folder: Path = tmp_path_factory.mktemp("cors")
    with KeyedDeployment(
        folder,
        catalogue=CATALOGUE,
        redis_server=None,
        API_KEYS=KEY,
        NODE_BIND=f"127.0.0.1:{free_port()}",
        CORS_ORIGINS=f"{ORIGIN}, {OTHER_ORIGIN}",
    ) as service:
        service.key = KEY
        yield service.start("echo")


def words(header: str) -> set[str]:
    return {word.strip().lower() for word in header.split(",")}


def check_allowed(answer: Answer, origin: str = ORIGIN) -> None:
    assert answer.headers["access-control-allow-origin"] == origin
    exposed = words(answer.headers["access-control-expose-headers"])
    assert {"x-request-id", "x-ignored-params", "x-should-retry", "retry-after"} <= exposed
    assert "origin" in words(answer.headers["vary"])
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


def check_not_allowed(answer: Answer) -> None:
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", [ORIGIN, OTHER_ORIGIN])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nothing/here"])
def test_a_preflight_request_needs_no_key(service: KeyedDeployment, origin: str, path: str) -> None:
    answer = ask(service.port, "OPTIONS", path, headers={"Origin": origin, **PREFLIGHT})
    assert (answer.status, answer.body) == (204, b"")
    check_allowed(answer, origin)
    assert {"get", "post"} <= words(answer.headers["access-control-allow-methods"])
    allowed = words(answer.headers["access-control-allow-headers"])
    assert {"authorization", "content-type", "x-api-key", "api-key", "x-request-id", "*"} <= allowed
    assert int(answer.headers["access-control-max-age"]) > 0


@pytest.mark.parametrize("origin", UNLISTED)
def test_an_origin_that_is_not_listed_gets_no_header(service: KeyedDeployment, origin: str) -> None:
    preflight = ask(service.port, "OPTIONS", CHAT, headers={"Origin": origin, **PREFLIGHT})
    check_error_body(preflight, 401)
    check_not_allowed(preflight)
    answer = ask(service.port, "GET", "/v1/models", headers={"Origin": origin, "x-api-key": KEY})
    assert answer.status == 200
    check_not_allowed(answer)
    assert "origin" in words(answer.headers["vary"])


def test_options_that_is_no_preflight_request_needs_a_key(service: KeyedDeployment) -> None:
    answer = ask(service.port, "OPTIONS", CHAT, headers={"Origin": ORIGIN})
    check_error_body(answer, 401)


def test_responses_and_errors_can_be_read(service: KeyedDeployment) -> None:
    headers = {"Origin": ORIGIN, "x-api-key": KEY, "Content-Type": "application/json"}
    body = json.dumps({"model": "echo", "messages": HI, "max_tokens": 2}).encode()
    answers = {
        200: ask(service.port, "POST", CHAT, body, headers),
        400: ask(service.port, "POST", CHAT, b"{", headers),
        401: ask(service.port, "POST", CHAT, body, {"Origin": ORIGIN}),
        404: ask(service.port, "GET", "/nothing/here", headers=headers),
        405: ask(service.port, "PUT", "/v1/models", headers=headers),
        503: ask(
            service.port, "POST", "/v1/images/generations", b'{"model":"echo-images","prompt":"a"}', headers
        ),
    }
    for status, answer in answers.items():
        assert answer.status == status
        check_allowed(answer)


def test_a_stream_can_be_read(service: KeyedDeployment) -> None:
    body = json.dumps({"model": "echo", "messages": HI, "stream": True}).encode()
    answer = ask(service.port, "POST", CHAT, body, {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    check_allowed(answer)


def test_a_response_without_origin_differs_by_it(service: KeyedDeployment) -> None:
    answer = ask(service.port, "GET", "/healthz")
    check_not_allowed(answer)
    assert "origin" in words(answer.headers["vary"])


def test_the_nodes_listener_allows_nothing(service: KeyedDeployment) -> None:
    """It needs no key, so a page that may read its responses could use the models."""
    port = int(service.environment()["NODE_BIND"].rpartition(":")[2])
    preflight = ask(port, "OPTIONS", CHAT, headers={"Origin": ORIGIN, **PREFLIGHT})
    check_error_body(preflight, 404)
    check_not_allowed(preflight)
    check_not_allowed(ask(port, "GET", "/healthz", headers={"Origin": ORIGIN}))


def test_what_gunicorn_refuses_has_no_cors_headers(service: KeyedDeployment) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: {ORIGIN}\r\nbad header\r\n\r\n"
    answer = converse(service.port, request.encode())
    assert answer.startswith(b"HTTP/1.1 400 ") and b"Access-Control" not in answer


def test_an_origin_that_cant_be_one_ends_the_start(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=CATALOGUE, CORS_ORIGINS="https://app.example.org/") as service:
        web = service.launch_web()
        assert web.popen.wait(60) == EXIT_CONFIGURATION
        assert web.tail().startswith(
            "web: environment: CORS_ORIGINS: 'https://app.example.org/' is not an origin"
        )
