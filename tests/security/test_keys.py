"""API keys: what requires one and what does not, the node's own listener, and the rate limit of each key."""

import hmac
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from limits import parse

from app.http.auth import Gate
from config import ConfigurationError, Settings
from protocol.errors import Unauthorized
from tests.deployment import Deployment, Process, free_port, wait_until
from tests.security.conftest import CATALOGUE, HI, Answer, KeyedDeployment, ask, check_error_body, converse
from tests.stand_in_node import StandInNode

PLAIN = "sk-plain-3f9a"
ODD = "käse = 100 % / 'ß\":;?"
LIMITED, OTHER, PROMPTS = "sk-limited", "sk-other", "sk-prompts"
LIMIT = 5
CHAT = json.dumps({"model": "echo", "messages": HI, "max_tokens": 2}).encode()
JSON = {"Content-Type": "application/json"}

POSTS = ["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"]
TEXT_POSTS = ["/v1/completions", "/tokenize", "/detokenize"]
"""Endpoints that need a worker and that the node doesn't know."""
GUARDED = [("POST", path) for path in (*POSTS, *TEXT_POSTS)]
GUARDED += [("GET", path) for path in ["/v1/models", "/v1/models/echo", "/v1/workers", "/metrics"]]
GUARDED += [("GET", "/v1/activity"), ("POST", "/v1/workers/x/drain"), ("POST", "/v1/workers/x/resume")]
GUARDED += [("GET", "/openapi.json"), ("GET", "/static"), ("GET", "/nothing/here"), ("GET", "/healthz/x")]
GUARDED += [("POST", "/v1/embeddings")]
GUARDED += [("OPTIONS", "/v1/chat/completions"), ("HEAD", "/v1/models"), ("PUT", "/v1/models")]
# Paths that would get past a check of prefixes.
GUARDED += [("GET", "//v1/workers"), ("GET", "/v1/images/files"), ("GET", "/v1/images/../workers")]
GUARDED += [("GET", "/v1//workers"), ("GET", "/healthz;/../v1/workers"), ("GET", "/%2fhealthz/../v1/workers")]
OPEN = [
    ("/healthz", 200),
    ("/readyz", 200),
    ("/health", 200),
    ("/ping", 200),
    ("/version", 200),
    ("/v1/images/files/" + "a" * 43, 404),
    ("/", 200),
    ("/docs", 200),
    ("/static/js/main.js", 200),
    ("/static/js/nothing.js", 404),
    ("/static/../v1/workers", 404),
]
OPEN += [("/v1/images/files/../../workers", 404), ("/v1/images/files/%2e%2e%2f%2e%2e%2fworkers", 404)]


@pytest.fixture(scope="module")
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, node: StandInNode) -> Iterator[KeyedDeployment]:
    """A deployment with keys, a rate limit and a node. Tests share it and must leave it as it is."""
    folder: Path = tmp_path_factory.mktemp("keys")
    environment = {
        "API_KEYS": ", ".join([PLAIN, ODD, LIMITED, OTHER, PROMPTS, "unlimited"]),
        "NODE_BIND": f"127.0.0.1:{free_port()}",
        "NODE_URL": node.url,
        "RATE_LIMIT": f"{LIMIT}/hour",
    }
    with KeyedDeployment(folder, catalogue=CATALOGUE, redis_server=None, **environment) as service:
        service.key = "unlimited"
        yield service.start("echo")


def bearer(key: str, encoding: str = "utf-8") -> dict[str, str]:
    # http.client encodes headers as Latin-1, so this sends exactly these bytes.
    return {**JSON, "Authorization": "Bearer " + key.encode(encoding).decode("latin-1")}


def node_port(service: Deployment) -> int:
    return int(service.environment()["NODE_BIND"].rpartition(":")[2])


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_needs_a_key(service: Deployment, method: str, path: str) -> None:
    answer = ask(service.port, method, path, CHAT if method == "POST" else None)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        check_error_body(answer, 401)
        assert answer.json["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {PLAIN}",
        PLAIN,
        f"Bearer {PLAIN}x",
        f"Bearer {PLAIN[:-1]}",
        f"Bearer {PLAIN.upper()}",
        f"Bearer {PLAIN},{OTHER}",
        f"Bearer {PLAIN}\x00",
        "Bearer \xff\xfe",
        "Bearer " + "x" * 6000,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_invalid_keys(service: Deployment, authorization: str) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: {authorization}\r\n\r\n"
    answer = converse(service.port, request.encode("latin-1"))
    # gunicorn refuses a header with a NUL before the key is checked.
    assert re.match(rb"HTTP/1\.1 40[01] ", answer), answer
    assert b'"data"' not in answer


def test_a_key_in_the_url_or_given_twice_is_refused(service: Deployment) -> None:
    check_error_body(ask(service.port, "GET", f"/v1/models?api_key={PLAIN}&key={PLAIN}"), 401)
    twice = f"Authorization: Bearer wrong\r\nAuthorization: Bearer {PLAIN}\r\n"
    answer = converse(
        service.port,
        f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{twice}\r\n".encode(),
    )
    assert re.match(rb"HTTP/1\.1 40[01] ", answer), answer


@pytest.mark.parametrize(
    ("key", "encoding"),
    [(PLAIN, "utf-8"), (ODD, "utf-8"), (ODD, "latin-1")],
    ids=["plain", "odd", "odd-latin1"],
)
def test_valid_keys(service: Deployment, key: str, encoding: str) -> None:
    headers = bearer(key, encoding)
    assert ask(service.port, "GET", "/v1/models", headers=headers).status == 200
    headers["Authorization"] = headers["Authorization"].replace("Bearer ", "bEARER  ")
    assert ask(service.port, "GET", "/v1/workers", headers=headers).status == 200
    options = ask(service.port, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert options.status == 200 and "POST" in options.headers["allow"]


def ask_with(service: Deployment, *lines: str) -> bytes:
    """Send a request with these header lines, repeated ones too; return the whole response."""
    head = ["GET /v1/models HTTP/1.1", "Host: localhost", "Connection: close", *lines]
    return converse(service.port, "\r\n".join([*head, "", ""]).encode("utf-8"))


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-API-Key", "API-KEY"])
def test_a_key_in_a_header_of_its_own(service: Deployment, name: str) -> None:
    for key in (PLAIN, ODD):
        assert ask_with(service, f"{name}: {key}").startswith(b"HTTP/1.1 200 ")
    for wrong in (f"{PLAIN}x", f"Bearer {PLAIN}", ""):
        assert ask_with(service, f"{name}: {wrong}").startswith(b"HTTP/1.1 401 ")
    full = ask(service.port, "GET", "/readyz", headers={name: PLAIN}).json
    assert full["models_without_worker"] == ["echo-images"]


@pytest.mark.parametrize(
    "lines",
    [
        (f"Authorization: Bearer {PLAIN}", f"x-api-key: {PLAIN}"),
        (f"x-api-key: {PLAIN}", f"api-key: {PLAIN}"),
        (f"x-api-key: {PLAIN}", "Authorization: Basic dXNlcjpwYXNzd29yZA=="),
        (f"x-api-key: {PLAIN}", "Authorization: Bearer", "api-key:"),
    ],
)
def test_one_key_in_several_headers(service: Deployment, lines: tuple[str, ...]) -> None:
    assert ask_with(service, *lines).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "lines",
    [
        (f"Authorization: Bearer {PLAIN}", f"x-api-key: {OTHER}"),
        (f"Authorization: Bearer {PLAIN}", "api-key: wrong"),
        (f"x-api-key: {PLAIN}", f"api-key: {OTHER}"),
        (f"x-api-key: {PLAIN}", f"x-api-key: {OTHER}"),
        (f"x-api-key: {PLAIN}", f"x-api-key: {PLAIN}"),
        (f"Authorization: Bearer {PLAIN}", f"Authorization: Bearer {PLAIN}"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", f"Authorization: Bearer {PLAIN}"),
        (f"Authorization: Bearer {PLAIN}", "Authorization: Basic dXNlcjpwYXNzd29yZA=="),
    ],
)
def test_several_keys_are_refused(service: Deployment, lines: tuple[str, ...]) -> None:
    answer = ask_with(service, *lines)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"several API keys; send one" in answer and PLAIN.encode() not in answer
    assert b'"invalid_api_key"' in answer


@pytest.mark.parametrize(("path", "status"), OPEN)
def test_needs_no_key(service: Deployment, path: str, status: int) -> None:
    answer = ask(service.port, "GET", path)
    # One of the two models has no worker, so the service is not ready.
    assert answer.status in ((200, 503) if path == "/readyz" else (status,))
    if answer.status == 404:
        check_error_body(answer)


def test_readyz_shows_details_only_with_a_key(service: Deployment) -> None:
    keyless = ask(service.port, "GET", "/readyz")
    assert keyless.json == {"code": 503, "message": "not ready"}
    wrong = ask(service.port, "GET", "/readyz", headers=bearer("wrong"))
    assert wrong.json == keyless.json
    full = ask(service.port, "GET", "/readyz", headers=bearer(PLAIN)).json
    assert full["models_without_worker"] == ["echo-images"]


def test_openapi_says_what_needs_a_key(service: Deployment) -> None:
    document = ask(service.port, "GET", "/openapi.json", headers=bearer(PLAIN)).json
    assert document["security"] == [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key", "api-key"}
    without = {path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []}
    probes = {"/healthz", "/readyz", "/health", "/ping", "/version"}
    assert without == probes | {"/v1/images/files/{name}"}


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any value is compared with all keys, by hmac.compare_digest, as digests of one length."""
    keys = ("first", "second", "third")
    gate = Gate(Settings(api_keys=keys, node_url=""))
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return real(given, known)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    app = Flask("test")
    for sent in (*keys, "", "f", "x" * 5000):
        for headers in ({"Authorization": f"Bearer {sent}"}, {"X-Api-Key": sent}, {"Api-Key": sent}):
            compared.clear()
            with app.test_request_context("/v1/models", headers=headers):
                assert gate.has_key() is (sent in keys)
            assert compared == [(32, 32)] * 3
    with app.test_request_context("/v1/models"), pytest.raises(Unauthorized):
        gate.check()


# ----- the node's listener


def test_the_node_calls_without_a_key(service: Deployment, node: StandInNode) -> None:
    node.wait_for(lambda node: node.cids("Test"), 60)
    (entry,) = node.entries("Test")
    assert f":{node_port(service)}/" in json.dumps(entry), entry
    assert node.call_chat("Test", "echo", HI).text == "".join(f"{number} " for number in range(8))


PAGE = ("/", "/static/js/main.js")
NOT_FOR_THE_NODE = [
    (method, path)
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")
    for path in (
        *POSTS,
        *TEXT_POSTS,
        "/v1/models",
        "/v1/workers",
        "/metrics",
        "/healthz",
        "/readyz",
        "/health",
        *PAGE,
    )
    if (method, path) != ("GET", "/healthz")
]


def test_a_worker_can_ask_the_nodes_listener_whether_it_is_ours(service: Deployment) -> None:
    answer = ask(node_port(service), "GET", "/healthz?namespace=Test&model=echo")
    assert (answer.status, answer.json) == (200, {"code": 0, "message": "ok", "serves": True})


@pytest.mark.parametrize(("method", "path"), NOT_FOR_THE_NODE)
def test_the_nodes_listener_offers_nothing_else(service: Deployment, method: str, path: str) -> None:
    for headers in ({}, bearer(PLAIN)):
        answer = ask(node_port(service), method, path, headers=headers)
        assert answer.status == 404
        if method != "HEAD":
            check_error_body(answer, 404)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1//models/", "/v1/chat/completions/x", "/v1/workers/x/drain", "/v1/embeddings"),
        *TEXT_POSTS,
    ],
)
def test_the_nodes_listener_offers_no_other_post(service: Deployment, path: str) -> None:
    check_error_body(ask(node_port(service), "POST", path, CHAT, JSON), 404)


def test_a_host_header_does_not_reach_the_nodes_listener(service: Deployment) -> None:
    headers = {**JSON, "Host": f"127.0.0.1:{node_port(service)}", "X-Forwarded-Port": str(node_port(service))}
    check_error_body(ask(service.port, "POST", "/v1/chat/completions", CHAT, headers), 401)
    request = (
        f"POST http://127.0.0.1:{node_port(service)}/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    )
    request += f"Connection: close\r\nContent-Length: {len(CHAT)}\r\n\r\n"
    assert converse(service.port, request.encode() + CHAT).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("bind", "node_bind", "name", "through"),
    [
        ("127.0.0.1:1088", "127.0.0.1:1089", ("127.0.0.1", 1089), True),
        ("127.0.0.1:1088", "localhost:1089", ("127.0.0.1", 1089), True),
        ("0.0.0.0:1088", "0.0.0.0:1089", ("10.0.0.3", 1089), True),
        ("0.0.0.0:1088", "[::1]:1089", ("::1", 1089, 0, 0), True),
        ("10.0.0.3:1088", "127.0.0.1:1088", ("127.0.0.1", 1088), True),
        ("10.0.0.3:1088", "127.0.0.1:1088", ("10.0.0.3", 1088), False),
        ("127.0.0.1:1088", "127.0.0.1:1089", ("127.0.0.1", 1088), False),
    ],
)
def test_which_listener_is_the_nodes(bind: str, node_bind: str, name: Any, through: bool) -> None:
    class Connection:
        def getsockname(self) -> Any:
            return name

    gate = Gate(Settings(bind=bind, node_bind=node_bind, api_keys=("k",), node_url=""))
    with Flask("test").test_request_context("/", environ_base={"gunicorn.socket": Connection()}):
        assert gate.through_node_listener() is through


# ----- rate limit


def chat(service: Deployment, key: str, port: int | None = None) -> Answer:
    return ask(port or service.port, "POST", "/v1/chat/completions", CHAT, bearer(key))


def test_the_rate_limit_counts_by_key_over_all_web_processes(service: KeyedDeployment) -> None:
    """Of 4 x LIMIT requests at once to two web processes LIMIT succeed; another key is not affected."""
    second = KeyedDeployment(
        service.folder / "second",
        catalogue=CATALOGUE,
        redis_server=service.redis,
        **{**service._environment, "NODE_BIND": f"127.0.0.1:{free_port()}"},
    )
    second.key = service.key
    with second:
        second.start_web()
        wait_until(lambda: second.worker_rows(), timeout_s=30, what="the second web process knows the worker")
        answers: list[Answer] = []
        begin = threading.Barrier(4 * LIMIT)

        def call(port: int) -> None:
            begin.wait(30)
            answers.append(chat(service, LIMITED, port))

        ports = [service.port, second.port] * 2 * LIMIT
        threads = [threading.Thread(target=call, args=(port,)) for port in ports]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert Counter(answer.status for answer in answers) == {200: LIMIT, 429: 3 * LIMIT}
        for answer in answers:
            if answer.status == 429:
                check_error_body(answer, 429)
                assert answer.json["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(answer.headers["retry-after"]) <= 3601
        assert chat(service, OTHER, second.port).status == 200, "another key has its own count"
    assert ask(service.port, "GET", "/v1/models", headers=bearer(LIMITED)).status == 200
    for path in TEXT_POSTS:
        check_error_body(ask(service.port, "POST", path, CHAT, bearer(LIMITED)), 429)
    listener = node_port(service)
    for _ in range(LIMIT + 1):
        assert ask(listener, "POST", "/v1/chat/completions", CHAT, JSON).status == 200, (
            "the node has no limit"
        )
    counters = [key for key in service.redis.client.keys("*") if b"rate" in key]
    assert counters
    for key in counters:
        assert b"sk-" not in key and service.redis.client.pttl(key) > 0


def test_a_request_with_several_prompts_counts_once(service: KeyedDeployment) -> None:
    body = json.dumps({"model": "echo", "prompt": ["Hi"] * 9, "max_tokens": 1}).encode()
    answers = [ask(service.port, "POST", "/v1/completions", body, bearer(PROMPTS)) for _ in range(LIMIT + 1)]
    assert [answer.status for answer in answers] == [200] * LIMIT + [429]


def test_without_redis_the_rate_limit_answers_503(tmp_path: Path) -> None:
    with KeyedDeployment(
        tmp_path, catalogue=CATALOGUE, redis_server=None, API_KEYS=PLAIN, RATE_LIMIT="1/hour",
        NODE_BIND=f"127.0.0.1:{free_port()}",
    ) as service:  # fmt: skip
        service.key = PLAIN
        service.start("echo")
        assert chat(service, PLAIN).status == 200
        assert chat(service, PLAIN).status == 429
        service.redis.kill()
        answers = [chat(service, PLAIN) for _ in range(3)]
        for answer in answers:
            check_error_body(answer, 503)
            assert answer.headers["retry-after"]


# ----- settings


@pytest.mark.parametrize("keys", [",", " , ,", " "])
def test_a_list_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """Setting API_KEYS asks for access control: a typing error must not turn it off."""
    monkeypatch.setenv("API_KEYS", keys)
    with pytest.raises(ConfigurationError, match="API_KEYS"):
        Settings.from_env()


@pytest.mark.parametrize(
    "limit", ["60", "60/fortnight", "0/minute", "-1/minute", "a/minute", "60/minute;DROP"]
)
def test_an_invalid_rate_limit_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("RATE_LIMIT", limit)
    with pytest.raises(ConfigurationError, match="RATE_LIMIT"):
        Settings.from_env()


@pytest.mark.parametrize("limit", ["", "60/minute", "1/second", "100/5 minutes", "5000/day", "7/2 hours"])
def test_valid_rate_limits(limit: str) -> None:
    settings = Settings(rate_limit=limit, api_keys=("k",))
    if limit:
        assert parse(settings.rate_limit).amount == int(limit.partition("/")[0])


@pytest.mark.parametrize(
    ("bind", "keys", "warned"),
    [
        ("127.0.0.1:1088", (), False),
        ("localhost:1088", (), False),
        ("[::1]:1088", (), False),
        ("0.0.0.0:1088", (), True),
        ("[::]:1088", (), True),
        ("192.0.2.7:1088", (), True),
        ("0.0.0.0:1088", ("k",), False),
    ],
)
def test_a_warning_for_listening_on_all_addresses_without_keys(
    bind: str, keys: tuple[str, ...], warned: bool
) -> None:
    found = Settings(bind=bind, api_keys=keys, node_url="").warnings()
    assert any("API_KEYS is empty" in warning for warning in found) is warned


def test_the_warning_is_logged_at_start(tmp_path: Path) -> None:
    """The application is imported and started as gunicorn does it; nothing listens, and there is no Redis."""
    service = Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, RATE_LIMIT="1/hour")
    command = ["-c", "from wsgi import app; app.extensions['modelservice'].start()"]
    environment = service.environment(BIND="0.0.0.0:1")
    process = Process("wsgi", [sys.executable, *command], environment, tmp_path / "wsgi.log")
    assert process.popen.wait(60) == 0, process.tail()
    assert "API_KEYS is empty: everyone who reaches it can use the GPUs" in process.tail()
    assert "nothing is limited" in process.tail()
