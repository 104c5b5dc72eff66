"""Hostile HTTP: ambiguous requests, and bodies that are too large, too deep or not text."""

import http.client
import json
import re
import socket
import threading
import time
from functools import partial
from typing import Any

import pytest

from app.chat.routes import MAX_BODY_BYTES
from app.images.body import MAX_JSON_BYTES
from tests.deployment import Deployment, Process, wait_until
from tests.security.conftest import HI, Answer, ask, check_error_body, converse

CHAT, GENERATIONS, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}
MIB = 2**20
BODY_LIMIT = MAX_BODY_BYTES
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps({"model": "echo", "messages": HI, "max_tokens": 1}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def head(*lines: bytes, start: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([start, b"Host: localhost", b"Content-Type: application/json", *lines]) + b"\r\n\r\n"


LENGTH = b"Content-Length: %d" % len(BODY)
TE = b"Transfer-Encoding: chunked"
REQUESTS: dict[str, bytes] = {
    "length and chunked": head(LENGTH, TE) + CHUNKED,
    "chunked and length": head(TE, b"Content-Length: 5") + CHUNKED,
    "two lengths": head(LENGTH, b"Content-Length: 5") + BODY,
    "two equal lengths": head(LENGTH, LENGTH) + BODY,
    "a list of lengths": head(b"Content-Length: %d, %d" % (len(BODY), len(BODY))) + BODY,
    "a length with a sign": head(b"Content-Length: +%d" % len(BODY)) + BODY,
    "a length below zero": head(b"Content-Length: -1") + BODY,
    "a length in hex": head(b"Content-Length: 0x10") + BODY,
    "a length with an underscore": head(b"Content-Length: 1_0") + BODY,
    "a length in other digits": head("Content-Length: ²".encode("latin-1")) + BODY,
    "an empty length": head(b"Content-Length:") + BODY,
    "a huge length": head(b"Content-Length: " + b"9" * 5000) + BODY,
    "xchunked": head(b"Transfer-Encoding: xchunked") + CHUNKED,
    "chunked twice": head(b"Transfer-Encoding: chunked, chunked") + CHUNKED,
    "two codings": head(TE, b"Transfer-Encoding: identity") + CHUNKED,
    "chunked, then another": head(b"Transfer-Encoding: chunked, gzip") + CHUNKED,
    "chunked not last": head(b"Transfer-Encoding: chunked, identity") + CHUNKED,
    "identity alone": head(b"Transfer-Encoding: identity", LENGTH) + BODY,
    "an empty coding": head(b"Transfer-Encoding:", LENGTH) + BODY,
    "a tab in the coding": head(b"Transfer-Encoding: \x0bchunked") + CHUNKED,
    "a quoted coding": head(b'Transfer-Encoding: "chunked"') + CHUNKED,
    "chunked in HTTP/1.0": head(TE, start=b"POST /v1/chat/completions HTTP/1.0") + CHUNKED,
    "a space before the colon": head(b"Transfer-Encoding : chunked") + CHUNKED,
    "a host with a space": head(b"Host : x", LENGTH) + BODY,
    "a tab before the colon": head(b"Content-Length\t: 5") + BODY,
    "a folded header": head(b"Transfer-Encoding:\r\n chunked") + CHUNKED,
    "a header folded away": head(b"X: y\r\n Transfer-Encoding: chunked", LENGTH) + BODY,
    "a header without a colon": head(b"nonsense", LENGTH) + BODY,
    "a header without a name": head(b": x", LENGTH) + BODY,
    "NUL in a header": head(b"X: a\x00b", LENGTH) + BODY,
    "NUL in a header's name": head(b"Content-\x00Length: 5") + BODY,
    "CR in a header": head(b"X: a\rTransfer-Encoding: chunked", LENGTH) + BODY,
    "LF in a header": head(b"X: a\nTransfer-Encoding: chunked", LENGTH) + BODY,
    "bare LFs": head(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "a bare LF at the end": head(LENGTH)[:-2] + b"\n" + BODY,
    "a chunk size with a sign": head(TE) + b"+5\r\nhello\r\n0\r\n\r\n",
    "a chunk size below zero": head(TE) + b"-5\r\nhello\r\n0\r\n\r\n",
    "a chunk size with 0x": head(TE) + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk size with an underscore": head(TE) + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "a chunk size of letters": head(TE) + b"zz\r\nhello\r\n0\r\n\r\n",
    "an empty chunk size": head(TE) + b"\r\nhello\r\n0\r\n\r\n",
    "a huge chunk size": head(TE) + b"f" * 400 + b"\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its size": head(TE) + b"2\r\nhello\r\n0\r\n\r\n",
    "a chunk that ends in LF": head(TE) + b"5\r\nhello\n0\r\n\r\n",
    "a chunk size that ends in LF": head(TE) + b"5\nhello\r\n0\r\n\r\n",
    "LF in a chunk's extension": head(TE) + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a forbidden trailer": head(TE) + b"0\r\nContent-Length: 5\r\n\r\n",
    "a version of its own": head(LENGTH, start=b"POST /v1/chat/completions HTTP/9.9") + BODY,
    "a version like HTTP/1.1a": head(LENGTH, start=b"POST /v1/chat/completions HTTP/1.1a") + BODY,
    "no version": b"GET /v1/models\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a space in the path": head(LENGTH, start=b"POST /v1/chat completions HTTP/1.1") + BODY,
    "a method of signs": head(LENGTH, start=b"PO(ST /v1/chat/completions HTTP/1.1") + BODY,
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("request_bytes", REQUESTS.values(), ids=REQUESTS.keys())
def test_an_ambiguous_request_is_refused(echo: Deployment, request_bytes: bytes) -> None:
    """There is at most one refusal, and what follows on the connection is not taken for a second request."""
    began = time.monotonic()
    answers = converse(echo.port, request_bytes + SMUGGLED)
    assert time.monotonic() - began < 30, "the connection must be closed"
    statuses = re.findall(rb"HTTP/1\.[01] (\d+) ", answers)
    # No response at all: the data ended before the request did.
    assert len(statuses) <= 1, answers
    assert all(status in (b"400", b"501", b"505", b"431", b"404") for status in statuses), answers
    assert b'"owned_by"' not in answers, "the smuggled request was served"


def test_what_follows_a_valid_request_is_served(echo: Deployment) -> None:
    """The test above would see the response to a second request."""
    valid = head(b"Content-Length: 2", start=b"POST /v1/nothing HTTP/1.1") + b"{}"
    last = SMUGGLED.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close")
    answers = converse(echo.port, valid + last)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answers) == [b"404", b"200"], answers
    assert b'"owned_by"' in answers


OVERSIZED = {
    "a long line": b"GET /v1/models?" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a line without end": b"GET /" + b"a" * MIB,
    "a long header": head(b"X: " + b"a" * 70_000),
    "a header without end": b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * MIB,
    "many headers": head(*[b"X-%d: y" % number for number in range(300)]),
    "headers without end": b"GET /v1/models HTTP/1.1\r\n" + b"X: y\r\n" * 200_000,
}


@pytest.mark.parametrize("request_bytes", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_oversized_headers(echo: Deployment, request_bytes: bytes) -> None:
    answers = converse(echo.port, request_bytes)
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", answers)
    # A client that is still sending may lose the response to a reset; the connection is closed all the same.
    assert statuses in ([], [b"400"], [b"414"], [b"431"]), answers


# ----- bodies


@pytest.mark.parametrize(
    ("path", "limit"), [(CHAT, MAX_BODY_BYTES), (GENERATIONS, MAX_JSON_BYTES), (EDITS, MAX_JSON_BYTES)]
)
def test_a_chunked_body_without_length_is_counted(echo: Deployment, path: str, limit: int) -> None:
    """The response to an endless body comes while it is being sent, and reading ends soon afterwards."""
    with socket.create_connection(("127.0.0.1", echo.port), timeout=60) as peer:
        peer.sendall(head(TE, start=f"POST {path} HTTP/1.1".encode()))
        sent, piece = 0, b"10000\r\n" + b"x" * 65536 + b"\r\n"
        stop = threading.Event()

        def send() -> None:
            nonlocal sent
            try:
                while not stop.is_set():
                    peer.sendall(piece)
                    sent += 65536
            except OSError:
                stop.set()

        sender = threading.Thread(target=send)
        sender.start()
        response = http.client.HTTPResponse(peer)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        stop.set()
        sender.join(60)
        assert not sender.is_alive()
    check_error_body(answer, 413)
    assert answer.json["error"]["code"] == "payload_too_large"
    # the piece that was being sent isn't counted
    assert limit - 65536 <= sent < limit + 512 * MIB


@pytest.mark.parametrize("path", [CHAT, GENERATIONS, EDITS])
def test_a_body_declared_too_large_is_not_read(echo: Deployment, path: str) -> None:
    request = head(b"Content-Length: %d" % (100 * 2**30), start=f"POST {path} HTTP/1.1".encode())
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as peer:
        peer.sendall(request)
        answer = peer.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 "), answer


DEPTH = 500_000
INVALID_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "deep lists": b"[" * DEPTH,
    "deep objects": b'{"a":' * DEPTH,
    "a deep field": b'{"model":"echo","messages":' + b"[" * DEPTH + b"]" * DEPTH + b"}",
    "deep tools": b'{"model":"echo","tools":' + b'{"a":' * DEPTH + b"1" + b"}" * DEPTH + b"}",
    "invalid UTF-8": b'{"model":"\xff\xfe"}',
    "an overlong NUL": b'{"model":"\xc0\x80"}',
    "a UTF-8 surrogate": b'{"model":"\xed\xa0\x80"}',
    "UTF-16": json.dumps({"model": "echo"}).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a lone surrogate": b'{"model":"echo","messages":[{"role":"user","content":"\\ud800"}]}',
    "surrogates in the wrong order": b'{"model":"\\udc00\\ud800"}',
    "half a surrogate at the end": b'{"model":"\\ud83d',
    "raw control characters": b'{"model":"\x00\x01"}',
    "NaN": b'{"temperature":NaN}',
    "Infinity": b'{"temperature":Infinity}',
    "too large a number": b'{"temperature":1e999}',
    "a number of 100,000 digits": b'{"seed":' + b"9" * 100_000 + b"}",
    "two documents": b"{}{}",
    "a comment": b'{"model":"echo"/**/}',
    "a trailing comma": b'{"model":"echo",}',
    "single quotes": b"{'model':'echo'}",
    "a text": b'"x"',
}


@pytest.mark.parametrize("path", [CHAT, GENERATIONS, EDITS])
@pytest.mark.parametrize("body", INVALID_BODIES.values(), ids=INVALID_BODIES.keys())
def test_what_is_not_a_json_object(echo: Deployment, path: str, body: bytes) -> None:
    check_error_body(ask(echo.port, "POST", path, body, JSON), 400)


def with_messages(messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": messages, **fields}, separators=(",", ":")).encode()


MANY = 1_000_000
FLOODS: dict[str, bytes] = {
    "empty messages": with_messages([{}] * MANY),
    "messages of null": with_messages([None] * MANY),
    "valid messages": with_messages([{"role": "user", "content": ""}] * 240_000),
    "empty parts": with_messages([{"role": "user", "content": [{}] * MANY}]),
    "parts of null": with_messages([{"role": "user", "content": [None] * MANY}]),
    "stops": with_messages(HI, stop=[0] * MANY),
    "token ids": with_messages(HI, stop_token_ids=["a"] * MANY),
    "biases": with_messages(HI, logit_bias={str(number): "a" for number in range(MANY // 2)}),
    "parts in many messages": with_messages([{"role": "user", "content": [{}] * 500}] * 4096),
}


@pytest.mark.parametrize("body", FLOODS.values(), ids=FLOODS.keys())
def test_a_million_items_do_not_block_other_requests(echo: Deployment, body: bytes) -> None:
    """Refused at the first invalid item: validating all of them would block the event loop for 28 s."""
    assert len(body) <= BODY_LIMIT
    began = time.monotonic()
    check_error_body(ask(echo.port, "POST", CHAT, body, JSON), 400)
    assert time.monotonic() - began < 15


def test_a_million_unknown_fields_are_ignored(echo: Deployment) -> None:
    body = with_messages(HI, max_tokens=1, **{f"x{number}": 0 for number in range(MANY // 2)})
    began = time.monotonic()
    answer = ask(echo.port, "POST", CHAT, body, JSON)
    assert time.monotonic() - began < 20
    assert answer.status == 200
    assert len(answer.headers["x-ignored-params"]) < 2000


@pytest.mark.parametrize(
    "content",
    ["\0", "a\0b", "\u202e", "😀" * 200, "\ufffe", "\r\n\r\ndata: [DONE]\n\n", "<|endoftext|>"],
    ids=repr,
)
def test_odd_but_valid_text_is_served(echo: Deployment, content: str) -> None:
    answer = ask(
        echo.port, "POST", CHAT, with_messages([{"role": "user", "content": content}], max_tokens=1), JSON
    )
    assert answer.status == 200, answer
    answer = ask(echo.port, "POST", CHAT, with_messages(HI, model=content), JSON)
    check_error_body(answer, 404)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_names_that_would_break_a_header_are_left_out(echo: Deployment, field: str) -> None:
    unknown = {"a\r\nSet-Cookie: x=1": 1, "b\0": 1, "ü": 1, "ok": 1, field * 100: 1}
    answer = ask(echo.port, "POST", CHAT, with_messages(HI, max_tokens=1, **unknown), JSON)
    assert answer.status == 200
    assert answer.headers["x-ignored-params"] == "ok"
    assert "set-cookie" not in answer.headers


# ----- errors of the framework


PAGES: list[tuple[str, str, int]] = [
    ("GET", "/nothing", 404),
    ("GET", "/v1//nothing", 404),
    ("GET", "/nothing/", 404),
    ("GET", "/v1/models/%ff%fe", 404),
    ("GET", "/v1/models/%00", 404),
    ("GET", "/v1/models/../../etc/passwd", 404),
    ("GET", "/v1/images/files/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v1/images/files/%00", 404),
    ("GET", "/%E2%80%AE", 404),
    ("GET", CHAT, 405),
    ("PUT", CHAT, 405),
    ("DELETE", "/v1/models", 405),
    ("POST", "/v1/models", 405),
    ("POST", "/healthz", 405),
    ("TRACE", "/healthz", 405),
    ("PROPFIND", "/healthz", 405),
    ("CONNECT", "/healthz", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), PAGES)
def test_errors_of_the_framework_have_the_same_body(
    echo: Deployment, method: str, path: str, status: int
) -> None:
    answer = ask(echo.port, method, path)
    check_error_body(answer, status)
    if status == 405:
        assert "allow" in answer.headers


def form(*parts: tuple[str, bytes], boundary: str = "b") -> tuple[bytes, dict[str, str]]:
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
        % (boundary.encode(), name.encode(), value)
        for name, value in parts
    )
    return body + f"--{boundary}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


FORMS: dict[str, tuple[bytes, dict[str, str]]] = {
    "no boundary": (b"x", {"Content-Type": "multipart/form-data"}),
    "an empty boundary": (b"x", {"Content-Type": "multipart/form-data; boundary="}),
    "a boundary that never comes": (b"x" * 1000, {"Content-Type": "multipart/form-data; boundary=q"}),
    "a boundary of 8,000 characters": (b"x", {"Content-Type": "multipart/form-data; boundary=" + "q" * 8000}),
    "no part": (b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}),
    "an unfinished part": (form(('name="prompt"', b"a"))[0][:-9], form()[1]),
    "many parts": form(*[('name="a"', b"")] * 5000),
    "invalid UTF-8": form(('name="prompt"', b"\xff\xfe"), ('name="image"; filename="a"', b"\xff")),
    "a part without a name": form(("x=y", b"a")),
    "headers without end": (b"--b\r\n" + b"X: y\r\n" * 100_000, form()[1]),
}


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("sent", FORMS.values(), ids=FORMS.keys())
def test_malformed_forms(echo: Deployment, path: str, sent: tuple[bytes, dict[str, str]]) -> None:
    answer: Answer = ask(echo.port, "POST", path, *sent)
    check_error_body(answer)
    assert answer.status in (400, 413), answer


# ----- request ids


def test_the_id_of_a_client_comes_back_with_every_response(echo: Deployment) -> None:
    headers = {**JSON, "X-Request-Id": "mine-1"}
    stream = json.dumps({"model": "echo", "messages": HI, "stream": True}).encode()
    for answer in (
        ask(echo.port, "POST", CHAT, BODY, headers),
        ask(echo.port, "POST", CHAT, stream, headers),
        ask(echo.port, "POST", CHAT, b"{", headers),
        ask(echo.port, "GET", "/nothing/here", headers=headers),
        ask(echo.port, "GET", "/health", headers=headers),
    ):
        assert answer.headers["x-request-id"] == "mine-1"
    plain = ask(echo.port, "POST", CHAT, BODY, JSON)
    assert plain.headers["x-request-id"] == plain.json["id"], "without one it is ours"


def test_the_log_has_both_ids_of_a_request(echo: Deployment) -> None:
    assert echo.web is not None
    body = json.dumps({"model": "echo", "messages": HI, "max_tokens": 1}).encode()
    ask(echo.port, "POST", CHAT, body, {**JSON, "X-Request-Id": "succeeds"})
    failing = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "raise"}]}).encode()
    answer = ask(echo.port, "POST", CHAT, failing, {**JSON, "X-Request-Id": "fails"})
    assert answer.status >= 400
    for status, name in ((200, "succeeds"), (answer.status, "fails")):
        ids = rf"request_id=cmpl-[0-9a-f]{{32}} client_request_id={name}$"
        line = re.compile(rf"request method=POST .* status={status} .* {ids}", re.M)
        wait_until(partial(_logged, echo.web, line), timeout_s=20, what=f"the line of {name!r} is written")


def _logged(process: Process, line: re.Pattern[str]) -> bool:
    # it is written when the client has the response already
    return line.search(process.log.read_text()) is not None


@pytest.mark.parametrize(
    "lines",
    [
        (b"X-Request-Id: " + b"a" * 129,),
        (b"X-Request-Id: a b",),
        (b"X-Request-Id: \xff",),
        (b"X-Request-Id: a",) * 2,
    ],
)
def test_an_id_that_is_no_short_token_is_replaced(echo: Deployment, lines: tuple[bytes, ...]) -> None:
    request = head(b"Connection: close", *lines, start=b"GET /healthz HTTP/1.1")
    assert re.search(rb"\r\nX-Request-Id: req-[0-9a-f]{32}\r\n", converse(echo.port, request))


def test_what_gunicorn_refuses_has_an_id_of_ours(echo: Deployment) -> None:
    answer = converse(echo.port, head(b"X-Request-Id: mine", b"bad header", start=b"GET /healthz HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert re.search(rb"\r\nX-Request-Id: req-[0-9a-f]{32}\r\n", answer)
