"""Callers that leave, stop reading, send by drops or come back late (rows 9, 10, 11 and 20 of the table in
docs/operations.md)."""

import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.deployment import Deployment, wait_until
from tests.faults.conftest import Starter, counted, read

JSON = {"Content-Type": "application/json"}


def in_hand(service: Deployment) -> int:
    """Tasks that a worker has taken and not finished."""
    return int(service.redis.client.hlen("Test:unacked"))


def queued(service: Deployment) -> int:
    """Tasks that no worker has taken. Ask before `in_hand`: a message goes from here to there."""
    return int(service.redis.client.llen("Test:model.echo"))


def waiting(service: Deployment) -> int:
    """Requests that are admitted and that no worker has claimed."""
    return int(service.redis.client.zcard("Test:waiting:echo"))


def chat_body(max_tokens: int, **fields: Any) -> bytes:
    message = {"role": "user", "content": "count"}
    return json.dumps({"model": "echo", "messages": [message], "max_tokens": max_tokens, **fields}).encode()


def idle_steps(service: Deployment, beyond: int = -1) -> int:
    """The engine's steps once the worker says that nothing runs and that more than `beyond` were done."""

    def found() -> dict[str, Any] | None:
        rows = service.worker_rows()
        return next((row for row in rows if not row["running"] and row["steps"] > beyond), None)

    row = wait_until(found, timeout_s=20, what=f"no running request and more than {beyond} steps")
    return int((row or {})["steps"])


def check_nothing_runs(service: Deployment, steps: int) -> None:
    """The next answer takes as many steps as it has tokens: nothing else was generated since `steps` were counted."""
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200
    assert idle_steps(service, beyond=steps) == steps + 3


def post_and_leave_later(service: Deployment, body: bytes) -> HTTPConnection:
    """Send a request; who closes the connection leaves without the answer."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, JSON)
    return connection


# ----- row 9: leavers


def test_leaving_a_stream_stops_its_generation(start: Starter) -> None:
    service = start(step_ms=50)
    before = idle_steps(service)
    stream = service.stream("count", "echo", max_tokens=50_000)
    next(stream.events())
    stream.close()
    wait_until(lambda: in_hand(service) == 0, timeout_s=8, what="the generation has stopped")
    check_nothing_runs(service, idle_steps(service, beyond=before))


def test_leaving_a_plain_request_stops_its_generation(start: Starter) -> None:
    service = start(step_ms=50)
    before = idle_steps(service)
    connection = post_and_leave_later(service, chat_body(50_000))
    wait_until(lambda: in_hand(service) == 1 and not waiting(service), timeout_s=10, what="it runs")
    connection.close()
    wait_until(lambda: in_hand(service) == 0, timeout_s=8, what="the generation has stopped")
    check_nothing_runs(service, idle_steps(service, beyond=before))


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_waiting_costs_no_step(start: Starter, stream: bool) -> None:
    service = start(step_ms=50, slots=1)
    before = idle_steps(service)
    (holder,) = read(service, 200)
    connection = post_and_leave_later(service, chat_body(50_000, stream=stream))
    wait_until(lambda: waiting(service) == 1, timeout_s=10, what="the second request waits")
    connection.close()
    wait_until(lambda: waiting(service) == 0, timeout_s=8, what="it is counted no more")
    assert not holder.ended.is_set(), "the only slot must have been taken all the while"
    holder.wait_end(60)
    assert holder.text == counted(200)
    wait_until(
        lambda: not queued(service) and not in_hand(service), timeout_s=10, what="its message is dropped"
    )
    assert idle_steps(service, beyond=before) == before + 200
    check_nothing_runs(service, before + 200)


# ----- row 10: a reader that stops reading


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_caller_who_stops_reading_is_cut_off(start: Starter) -> None:
    service = start(step_ms=5)
    # quick enough to fill the caller's window, too slow to fill the kernel's buffers in time
    (other,) = read(service, 12_000)
    with closing(socket.socket()) as deaf:
        # a small window is full soon; with a large one the kernel takes in minutes of text before anybody waits
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", service.port))
        body = chat_body(100_000, stream=True)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        deaf.sendall(head.encode() + body)
        assert deaf.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: in_hand(service) == 2, timeout_s=10, what="both run")
        deaf_since = time.monotonic()
        wait_until(
            lambda: in_hand(service) == (0 if other.ended.is_set() else 1),
            timeout_s=40,
            what="who does not read is cut off",
        )
        print(f"freed after {time.monotonic() - deaf_since:.1f} s")
        rest = b""
        try:
            while part := deaf.recv(65536):
                rest += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in rest
    other.wait_end(120)
    assert other.done, other.error
    assert other.text == counted(12_000)


# ----- row 11: by drops


class Drips:
    """Connections that send one byte a second, and when each was closed by the other side."""

    def __init__(self, port: int, openings: list[bytes]) -> None:
        self.closed: dict[int, float] = {}
        self.answers: dict[int, bytes] = {}
        self._watch = selectors.DefaultSelector()
        self._open: dict[int, socket.socket] = {}
        self.began = time.monotonic()
        self._drip_at = self.began + 1
        for number, opening in enumerate(openings):
            drip = socket.create_connection(("127.0.0.1", port))
            drip.sendall(opening)
            drip.setblocking(False)
            self._open[number] = drip
            self._watch.register(drip, selectors.EVENT_READ, number)

    def turn(self) -> None:
        """Wait at most 50 ms for what the server does; send the next byte everywhere when a second has passed."""
        for key, _ in self._watch.select(0.05):
            number = key.data
            try:
                got = self._open[number].recv(65536)
            except ConnectionResetError:
                got = b""
            if got:
                self.answers[number] = self.answers.get(number, b"") + got
            else:
                self._end(number)
        if time.monotonic() >= self._drip_at:
            self._drip_at += 1
            for number in list(self._open):
                try:
                    self._open[number].send(b"x")
                except OSError:
                    self._end(number)

    def _end(self, number: int) -> None:
        self.closed[number] = time.monotonic() - self.began
        drip = self._open.pop(number)
        self._watch.unregister(drip)
        drip.close()

    def close(self) -> None:
        for number in list(self._open):
            self._end(number)
        self._watch.close()


HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "
DRIP_BODY = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: 4000000\r\n\r\n{"


def drip_openings(heads: int, bodies: int) -> list[bytes]:
    """Half-sent heads, then heads of requests whose body never ends."""
    kinds = [
        (b"/v1/chat/completions", b"application/json"),
        (b"/v1/images/generations", b"application/json"),
        (b"/v1/images/edits", b"multipart/form-data; boundary=x"),
        (b"/v1/nothing", b"application/json"),
    ]
    return [HALF_HEAD] * heads + [DRIP_BODY % kinds[i % len(kinds)] for i in range(bodies)]


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_heads_and_bodies_that_come_by_drops(start: Starter) -> None:
    service = start()
    drips = Drips(service.port, drip_openings(100, 100))
    waits: list[float] = []
    with closing(drips):
        while len(drips.closed) < 200:
            assert time.monotonic() - drips.began < 200, f"still open: {200 - len(drips.closed)}"
            drips.turn()
            if int(time.monotonic() * 20) % 20 == 0:
                asked_at = time.monotonic()
                assert service.get("/v1/models")[0] == 200
                waits.append(time.monotonic() - asked_at)
    bodies = [drips.closed[number] for number in range(100, 200)]
    print(f"bodies closed after {max(bodies):.1f} s, heads after {max(drips.closed.values()):.1f} s")
    assert max(bodies) < 30
    assert max(drips.closed.values()) < 200
    assert statistics.median(waits) < 2, "the others must not wait"
    for number in (100, 101, 102):
        head, _, body = drips.answers[number].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408"), head
        assert json.loads(body)["error"]["code"] == "request_timeout"
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200


# ----- row 20: connections kept for the next request


@pytest.fixture
def connect() -> Iterator[Callable[[Deployment], HTTPConnection]]:
    with ExitStack() as stack:
        yield lambda service: stack.enter_context(
            closing(HTTPConnection("127.0.0.1", service.port, timeout=60))
        )


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_connections_that_were_idle_for_85_seconds(
    start: Starter, connect: Callable[[Deployment], HTTPConnection]
) -> None:
    service = start(step_ms=1)
    connections = [connect(service) for _ in range(100)]
    sockets = []
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", chat_body(2), JSON)
        assert connection.getresponse().read()
        sockets.append(connection.sock)
    idle_since = time.monotonic()
    wait_until(lambda: time.monotonic() - idle_since > 85, timeout_s=100, what="85 seconds")
    for connection, before in zip(connections, sockets, strict=True):
        # without this http.client would open a new connection where the old one is closed
        connection.auto_open = 0
        connection.request("POST", "/v1/chat/completions", chat_body(2), JSON)
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["choices"][0]["message"]["content"] == counted(2)
        assert connection.sock is before
