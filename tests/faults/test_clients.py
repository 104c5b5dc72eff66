"""Clients that disconnect, stop reading, send slowly or reuse idle connections."""

import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.image_store import ImageStore
from protocol.names import Keys
from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.faults.conftest import Starter, counted, read

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A worker that serves one request at a time, in steps of 50 ms. Tests share it and leave it idle."""
    folder = tmp_path_factory.mktemp("one_slot")
    with Deployment(folder, catalogue=ECHO_CATALOGUE.format(step_ms=50, slots=1)) as service:
        yield service.start("echo")


def queued(service: Deployment) -> int:
    """Tasks that no worker has received. Ask before `running_tasks`: a message moves from here to there."""
    return int(service.redis.client.llen("Test:model.echo"))


def waiting(service: Deployment) -> int:
    """Requests that are admitted and that no worker has claimed."""
    return int(service.redis.client.zcard("Test:waiting:echo"))


def chat_body(max_tokens: int, **fields: Any) -> bytes:
    message = {"role": "user", "content": "count"}
    return json.dumps({"model": "echo", "messages": [message], "max_tokens": max_tokens, **fields}).encode()


def idle_steps(service: Deployment, beyond: int = -1) -> int:
    """Wait until the worker reports more than `beyond` steps and no running request; return the steps."""

    def found() -> dict[str, Any] | None:
        rows = service.worker_rows()
        return next((row for row in rows if not row["running"] and row["steps"] > beyond), None)

    row = wait_until(found, timeout_s=20, what=f"no running request and more than {beyond} steps")
    return int((row or {})["steps"])


def check_nothing_runs(service: Deployment, steps: int) -> None:
    """Check that since `steps` were reported only the next answer takes steps, one for each token."""
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200
    assert idle_steps(service, beyond=steps) == steps + 3


def post_without_waiting(service: Deployment, body: bytes) -> HTTPConnection:
    """Send a request. Closing the connection is disconnecting without the answer."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, JSON)
    return connection


# ----- disconnects


def test_closing_a_stream_stops_its_generation(one_slot: Deployment) -> None:
    before = idle_steps(one_slot)
    stream = one_slot.stream("count", "echo", max_tokens=50_000)
    next(stream.events())
    stream.close()
    wait_until(lambda: one_slot.running_tasks() == 0, timeout_s=8, what="the generation has stopped")
    check_nothing_runs(one_slot, idle_steps(one_slot, beyond=before))


def test_closing_a_plain_request_stops_its_generation(one_slot: Deployment) -> None:
    before = idle_steps(one_slot)
    connection = post_without_waiting(one_slot, chat_body(50_000))
    wait_until(lambda: one_slot.running_tasks() == 1 and not waiting(one_slot), timeout_s=10, what="it runs")
    connection.close()
    wait_until(lambda: one_slot.running_tasks() == 0, timeout_s=8, what="the generation has stopped")
    check_nothing_runs(one_slot, idle_steps(one_slot, beyond=before))


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_closed_while_it_waits_costs_no_step(one_slot: Deployment, stream: bool) -> None:
    before = idle_steps(one_slot)
    (holder,) = read(one_slot, 200)
    connection = post_without_waiting(one_slot, chat_body(50_000, stream=stream))
    wait_until(lambda: waiting(one_slot) == 1, timeout_s=10, what="the second request waits")
    connection.close()
    wait_until(lambda: waiting(one_slot) == 0, timeout_s=8, what="it no longer counts as waiting")
    assert not holder.ended.is_set(), "the only slot must have been taken all the time"
    holder.wait_end(60)
    assert holder.text == counted(200)
    wait_until(
        lambda: not queued(one_slot) and not one_slot.running_tasks(),
        timeout_s=10,
        what="its message is dropped",
    )
    assert idle_steps(one_slot, beyond=before) == before + 200
    check_nothing_runs(one_slot, before + 200)


# ----- a client that stops reading


@pytest.mark.faults
@pytest.mark.slow
def test_a_client_that_stops_reading_is_disconnected(start: Starter) -> None:
    service = start(step_ms=5)
    # Fast enough to fill the client's window, too slow to fill the kernel's buffers in time.
    (other,) = read(service, 12_000)
    with closing(socket.socket()) as unread:
        # With a large window the kernel would buffer minutes of text before the server has to wait.
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", service.port))
        body = chat_body(100_000, stream=True)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        unread.sendall(head.encode() + body)
        assert unread.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: service.running_tasks() == 2, timeout_s=10, what="both run")
        unread_since = time.monotonic()
        wait_until(
            lambda: service.running_tasks() == (0 if other.ended.is_set() else 1),
            timeout_s=40,
            what="the client that does not read is disconnected",
        )
        print(f"freed after {time.monotonic() - unread_since:.1f} s")
        rest = b""
        try:
            while part := unread.recv(65536):
                rest += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in rest
    other.wait_end(120)
    assert other.done, other.error
    assert other.text == counted(12_000)


def test_clients_that_do_not_read_an_image_hold_little_and_are_disconnected(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=ECHO_CATALOGUE.format(step_ms=0, slots=1)) as service:
        service.redis.start()
        service.start_web()
        assert service.web is not None
        (web,) = psutil.Process(service.web.pid).children()
        store = ImageStore(service.redis.client, Keys.of("Test"), ttl_s=300, capacity_bytes=2**30)
        name = store.new_name()
        store.put(name, bytes(30 * 2**20))

        def held() -> int:
            peers = [
                at.raddr.port for at in web.net_connections() if at.laddr.port == service.port and at.raddr
            ]
            return len(ports.intersection(peers))

        before = web.memory_info().rss
        with ExitStack() as stack:
            ports = set()
            for _ in range(30):
                unread = stack.enter_context(closing(socket.socket()))
                unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                unread.connect(("127.0.0.1", service.port))
                unread.sendall(f"GET /v1/images/files/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert unread.recv(100).startswith(b"HTTP/1.1 200")
                ports.add(unread.getsockname()[1])
            assert held() == 30
            grown = (web.memory_info().rss - before) / 2**20
            wait_until(
                lambda: held() == 0, timeout_s=40, what="the clients that do not read are disconnected"
            )
        assert grown < 100, f"{grown:.0f} MiB for 30 readers of 30 MiB"
        assert "Traceback" not in service.web.log.read_text()


# ----- clients that send slowly


class SlowConnections:
    """Connections that send one byte a second; notes when the server closes each."""

    def __init__(self, port: int, openings: list[bytes]) -> None:
        self.closed: dict[int, float] = {}
        self.answers: dict[int, bytes] = {}
        self._watch = selectors.DefaultSelector()
        self._open: dict[int, socket.socket] = {}
        self.began = time.monotonic()
        self._send_at = self.began + 1
        for number, opening in enumerate(openings):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(opening)
            connection.setblocking(False)
            self._open[number] = connection
            self._watch.register(connection, selectors.EVENT_READ, number)

    def turn(self) -> None:
        """Wait for the server for at most 50 ms; once a second, send the next byte on every connection."""
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
        if time.monotonic() >= self._send_at:
            self._send_at += 1
            for number in list(self._open):
                try:
                    self._open[number].send(b"x")
                except OSError:
                    self._end(number)

    def _end(self, number: int) -> None:
        self.closed[number] = time.monotonic() - self.began
        connection = self._open.pop(number)
        self._watch.unregister(connection)
        connection.close()

    def close(self) -> None:
        for number in list(self._open):
            self._end(number)
        self._watch.close()


HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
ENDLESS_BODY = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: 4000000\r\n\r\n{"


def slow_openings(heads: int, bodies: int) -> list[bytes]:
    """Return unfinished heads, then heads of requests whose body never ends."""
    kinds = [
        (b"/v1/chat/completions", b"application/json"),
        (b"/v1/images/generations", b"application/json"),
        (b"/v1/images/edits", b"multipart/form-data; boundary=x"),
        (b"/v1/nothing", b"application/json"),
    ]
    return [HALF_HEAD] * heads + [ENDLESS_BODY % kinds[i % len(kinds)] for i in range(bodies)]


@pytest.mark.faults
@pytest.mark.slow
def test_heads_and_bodies_that_arrive_slowly(start: Starter) -> None:
    service = start()
    slow = SlowConnections(service.port, slow_openings(100, 100))
    waits: list[float] = []
    with closing(slow):
        while len(slow.closed) < 200:
            assert time.monotonic() - slow.began < 200, f"still open: {200 - len(slow.closed)}"
            slow.turn()
            if int(time.monotonic() * 20) % 20 == 0:
                asked_at = time.monotonic()
                assert service.get("/v1/models")[0] == 200
                waits.append(time.monotonic() - asked_at)
    bodies = [slow.closed[number] for number in range(100, 200)]
    print(f"bodies closed after {max(bodies):.1f} s, heads after {max(slow.closed.values()):.1f} s")
    assert max(bodies) < 30
    assert max(slow.closed.values()) < 200
    assert statistics.median(waits) < 2, "other requests must not wait"
    for number in (100, 101, 102):
        head, _, body = slow.answers[number].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408"), head
        assert json.loads(body)["error"]["code"] == "request_timeout"
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200


# ----- connections kept for the next request


@pytest.fixture
def connect() -> Iterator[Callable[[Deployment], HTTPConnection]]:
    with ExitStack() as stack:
        yield lambda service: stack.enter_context(
            closing(HTTPConnection("127.0.0.1", service.port, timeout=60))
        )


@pytest.mark.faults
@pytest.mark.slow
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
        # Otherwise http.client would replace a closed connection by a new one.
        connection.auto_open = 0
        connection.request("POST", "/v1/chat/completions", chat_body(2), JSON)
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["choices"][0]["message"]["content"] == counted(2)
        assert connection.sock is before
