"""Web processes that stop, die, pause or are away for a while."""

import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from protocol.leases import LEASE_TTL_S
from tests.deployment import ECHO_CATALOGUE, Deployment, RedisServer, Stream, wait_until
from tests.faults.conftest import Reader, Starter, counted, read, wait_served
from tests.faults.test_clients import JSON, chat_body, waiting
from tests.stand_in_node import StandInNode

# ----- SIGTERM under load


class Streams:
    """Many streams at once, read by one thread. Notes what each received, and when it ended."""

    def __init__(self, port: int, bodies: list[bytes]) -> None:
        self.texts = [b""] * len(bodies)
        self.ended: dict[int, float] = {}
        self._watch = selectors.DefaultSelector()
        for number, body in enumerate(bodies):
            client = socket.create_connection(("127.0.0.1", port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            client.setblocking(False)
            self._watch.register(client, selectors.EVENT_READ, number)

    def turn(self) -> None:
        """Read what has arrived; wait for it for at most 50 ms."""
        for key, _ in self._watch.select(0.05):
            assert isinstance(key.fileobj, socket.socket)
            try:
                got = key.fileobj.recv(262144)
            except ConnectionResetError:
                got = b""
            self.texts[key.data] += got
            # The last chunk ends a response on a connection that stays open.
            if not got or self.texts[key.data].endswith(b"\r\n0\r\n\r\n"):
                self.ended.setdefault(key.data, time.monotonic())
            if not got:
                self._watch.unregister(key.fileobj)
                key.fileobj.close()

    def begun(self) -> int:
        return sum(b'"content":"' in text for text in self.texts)

    def close(self) -> None:
        for key in list(self._watch.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._watch.close()


@pytest.mark.faults
def test_sigterm_with_five_hundred_streams(start: Starter) -> None:
    service = start(step_ms=1000, slots=512, MAX_WAITING="600")
    assert service.web is not None
    short, long = chat_body(8, stream=True), chat_body(5000, stream=True)
    # An idle connection must not keep the process running.
    with closing(socket.create_connection(("127.0.0.1", service.port))):
        with closing(Streams(service.port, [short, long] * 250)) as streams:
            give_up_at = time.monotonic() + 90
            while streams.begun() < 500:
                assert time.monotonic() < give_up_at, f"{streams.begun()} of 500 have begun"
                streams.turn()
            service.web.signal(signal.SIGTERM)
            told_at = time.monotonic()
            while len(streams.ended) < 500 or service.web.popen.poll() is None:
                assert time.monotonic() - told_at < 60, f"{len(streams.ended)} of 500 have ended"
                streams.turn()
            exited_at = time.monotonic()
    last = max(streams.ended.values()) - told_at
    finished = [text for text in streams.texts if b"data: [DONE]" in text]
    failed = [text for text in streams.texts if b'"code":"shutting_down"' in text]
    print(
        f"{len(finished)} finished, {len(failed)} failed; last {last:.1f} s, exit {exited_at - told_at:.1f} s"
    )
    assert len(finished) + len(failed) == 500, "a stream was cut without an error event"
    assert len(finished) >= 250, "the short ones had time to finish"
    assert len(failed) >= 250, "the long ones can't have finished"
    assert not any(b"data: [DONE]" in text for text in failed)
    assert last < 50
    assert exited_at - told_at < 60
    assert service.web.popen.returncode == 0
    assert "WORKER TIMEOUT" not in service.web.tail()


# ----- one of two is killed


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """Closes the connections that a test has opened."""
    with ExitStack() as stack:
        yield stack


def web_processes(service: Deployment) -> list[int]:
    """Return the process ids of the two gunicorn workers."""
    assert service.web is not None
    master = psutil.Process(service.web.pid)
    return [child.pid for child in wait_until(lambda: _pair(master), timeout_s=30, what="two web processes")]


def _pair(master: psutil.Process) -> list[psutil.Process]:
    children = master.children()
    return children if len(children) == 2 else []


def connect_to(service: Deployment, pid: int, clients: ExitStack) -> HTTPConnection:
    """Open connections until the web process `pid` has accepted one; return that one."""

    def accepted() -> HTTPConnection | None:
        connection = clients.enter_context(closing(HTTPConnection("127.0.0.1", service.port, timeout=60)))
        connection.connect()
        own = connection.sock.getsockname()
        holder = wait_until(lambda: _holder(service, own), timeout_s=10, what="the connection is accepted")
        if holder == pid:
            return connection
        return None  # the others stay open until the test ends

    found = wait_until(accepted, timeout_s=60, what=f"web process {pid} takes a connection")
    assert found is not None
    return found


def wait_serving(connection: HTTPConnection) -> None:
    """Wait until the web process of this connection reaches Redis and knows the worker of `echo`."""

    def serving() -> bool:
        connection.request("GET", "/readyz")
        body = json.loads(connection.getresponse().read())
        return body["redis"] == "ok" and "echo" not in body["models_without_worker"]

    wait_until(serving, timeout_s=30, what="the web process can admit requests")


def _holder(service: Deployment, own: tuple[str, int]) -> int | None:
    for pid in web_processes(service):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if tuple(connection.raddr) == own:
                return pid
    return None


def stream_through(connection: HTTPConnection, tokens: int) -> Reader:
    connection.request("POST", "/v1/chat/completions", chat_body(tokens, stream=True), JSON)
    reader = Reader(Stream(connection.getresponse(), connection))
    reader.wait_parts(1)
    return reader


@pytest.mark.slow
def test_one_of_two_web_processes_is_killed(start: Starter, clients: ExitStack) -> None:
    service = start(step_ms=50, slots=4, WEB_CONCURRENCY="2")
    victim, survivor = web_processes(service)
    cut = [stream_through(connect_to(service, victim, clients), 50_000) for _ in range(2)]
    kept = [stream_through(connect_to(service, survivor, clients), 600) for _ in range(2)]
    for _ in range(3):
        connection = connect_to(service, victim, clients)
        connection.request("POST", "/v1/chat/completions", chat_body(50_000), JSON)
    # In the queue, too: a process killed before it sends leaves an entry that counts until its deadline.
    wait_until(
        lambda: waiting(service) == service.redis.client.llen("Test:model.echo") == 3,
        timeout_s=10,
        what="three wait",
    )
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    for reader in cut:
        reader.wait_end(20)
        assert not reader.done
    wait_until(lambda: waiting(service) == 0, timeout_s=30, what="none of its requests counts as waiting")
    wait_until(
        lambda: service.running_tasks() <= sum(not reader.ended.is_set() for reader in kept),
        timeout_s=killed_at + 30 - time.monotonic(),
        what="its tasks are cancelled",
    )
    print(f"cancelled after {time.monotonic() - killed_at:.1f} s")
    for reader in kept:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(600)
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200


def test_what_a_killed_process_admitted_counts_until_its_deadline(start: Starter, clients: ExitStack) -> None:
    service = start(step_ms=50, slots=1, WEB_CONCURRENCY="2", MAX_WAITING="3", CHAT_DEADLINE_S="10")
    victim, survivor = web_processes(service)
    through_victim = [connect_to(service, victim, clients) for _ in range(4)]
    through_survivor = connect_to(service, survivor, clients)
    for connection in (through_victim[3], through_survivor):
        wait_serving(connection)
    # No worker claims: what is admitted keeps waiting until its deadline.
    service.workers["echo-1"].signal(signal.SIGSTOP)
    # Were its lease to expire, requests would be refused because there is no worker.
    for lease in service.redis.client.scan_iter("Test:lease:*"):
        service.redis.client.expire(lease, 60)
    for connection in through_victim[:3]:
        connection.request("POST", "/v1/chat/completions", chat_body(3), JSON)
    wait_until(lambda: waiting(service) == 3, timeout_s=20, what="the queue is full")
    admitted_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)

    asked_at = admitted_at

    def refused() -> bool:
        nonlocal asked_at
        asked_at = time.monotonic()
        through_survivor.request("POST", "/v1/chat/completions", chat_body(3), JSON)
        response = through_survivor.getresponse()
        body = response.read()
        if b'"overloaded"' in body:
            assert response.status == 503
            return True
        # Admitted: it waited until its own deadline, since no worker runs.
        assert response.status == 504, body
        return False

    assert refused(), "the deadline of the killed process' requests has not passed yet"
    wait_until(lambda: not refused(), timeout_s=40, what="a request is admitted again")
    assert asked_at - admitted_at > 2
    service.workers["echo-1"].signal(signal.SIGCONT)


# ----- away for a while


@pytest.mark.faults
def test_web_is_down_for_thirty_seconds(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        cids = sorted(node.cids("Test"))
        assert service.web is not None
        service.web.end()
        down_at = time.monotonic()
        node.wait_for(lambda node: not node.cids("Test"), 60)
        print(f"unregistered after {time.monotonic() - down_at:.1f} s")
        wait_until(lambda: time.monotonic() - down_at > 30, timeout_s=60, what="thirty seconds")
        assert not node.cids("Test")
        service.start_web()
        up_at = time.monotonic()
        node.wait_for(lambda node: sorted(node.cids("Test")) == cids, 60)
        print(f"registered again after {time.monotonic() - up_at:.1f} s")
        wait_served(service)
        assert not node.seen("project/unregister")
        for process in service.workers.values():
            process.check_alive()


@pytest.mark.parametrize("first", ["web", pytest.param("worker", marks=pytest.mark.faults)])
def test_web_and_worker_are_paused_together_for_longer_than_a_lease(start: Starter, first: str) -> None:
    """As if the machine was paused: all leases expire, and `first` looks before the other renews its own."""
    service = start(step_ms=50)
    (reader,) = read(service, 100)
    redis = service.redis.client
    (replay,) = redis.keys("Test:events:*")
    assert service.web is not None
    web, worker = service.web, service.workers["echo-1"]
    for process in (web, worker):
        os.killpg(process.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_until(
        lambda: time.monotonic() - stopped_at > LEASE_TTL_S + 3, timeout_s=30, what="all leases expire"
    )
    written = redis.llen(replay)
    if first == "web":
        os.killpg(web.pid, signal.SIGCONT)
        service.wait_worker("echo-1", "lost", timeout_s=20)
        os.killpg(worker.pid, signal.SIGCONT)
    else:
        os.killpg(worker.pid, signal.SIGCONT)
        wait_until(lambda: redis.keys("Test:lease:*"), timeout_s=20, what="the worker renews its lease")
        wait_until(lambda: redis.llen(replay) > written + 5, timeout_s=20, what="the worker goes on")
        os.killpg(web.pid, signal.SIGCONT)
    reader.wait_end(60)
    assert reader.done, reader.error
    assert reader.text == counted(100)


def test_web_is_paused_alone_for_longer_than_its_lease(start: Starter) -> None:
    """The worker cancels the requests of a web process that looks dead; their clients are still there."""
    service = start(step_ms=50)
    (reader,) = read(service, 2000)
    plain = ThreadPoolExecutor(1).submit(service.chat, "hi", "echo", max_tokens=2000)
    wait_until(lambda: service.worker_rows()[0]["running"] == 2, timeout_s=20, what="both requests run")
    assert service.web is not None
    os.killpg(service.web.pid, signal.SIGSTOP)
    redis = service.redis.client
    wait_until(lambda: not redis.keys("Test:job:*"), timeout_s=60, what="the worker cancels both requests")
    os.killpg(service.web.pid, signal.SIGCONT)
    reader.wait_end(20)
    assert not reader.done
    assert reader.error is not None, "the stream must not end without a word"
    assert reader.error["error"]["code"] == "interrupted" and reader.error["code"] == 503
    status, body = plain.result(timeout=30)
    assert (status, body["error"]["code"]) == (503, "interrupted")
    status, body = service.chat("hi", "echo", max_tokens=3)
    assert status == 200, "the first request after the pause is served"


def probes(service: Deployment) -> float:
    """Return how many GET /healthz the web process has answered."""
    response, connection = service.request("GET", "/metrics")
    with closing(connection):
        lines = response.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith('http_requests_total{route="/healthz"')
    )


@pytest.mark.faults
def test_a_slow_probe_changes_nothing(start: Starter) -> None:
    with StandInNode() as node:
        service = start(step_ms=50, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 1, 20)
        (reader,) = read(service, 400)
        assert service.web is not None
        before = probes(service)
        wait_until(lambda: probes(service) > before, timeout_s=20, what="a probe")
        probed_at = time.monotonic()
        # The next probe comes after 5 s and gives up after 2.
        wait_until(lambda: time.monotonic() - probed_at > 3, timeout_s=10, what="shortly before the next")
        os.killpg(service.web.pid, signal.SIGSTOP)
        wait_until(lambda: time.monotonic() - probed_at > 8, timeout_s=10, what="shortly after it")
        os.killpg(service.web.pid, signal.SIGCONT)
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(400)
        # Two more probes: a worker that miscounted would have unregistered by then.
        wait_until(lambda: time.monotonic() - probed_at > 20, timeout_s=30, what="the next probes")
        assert not [call for call in node.seen("model/unregister") if call.at > probed_at]
        assert len(node.cids("Test")) == 1


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process `pid` has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught & 1 << number - 1)


def has_handlers_of_its_master(pid: int) -> bool:
    """Whether the gunicorn worker `pid` has not changed them yet. Its own handlers leave SIGHUP out."""
    return catches(pid, signal.SIGTERM) and catches(pid, signal.SIGHUP)


HOLD_AFTER_FORK = """
import time
exec(compile(open("gunicorn.conf.py").read(), "gunicorn.conf.py", "exec"))
configured = post_fork
def post_fork(server, worker):
    configured(server, worker)
    print("forked", flush=True)
    time.sleep(60)
"""


def test_stopped_right_after_the_fork(tmp_path: Path, redis_server: RedisServer) -> None:
    configuration = tmp_path / "held.conf.py"
    configuration.write_text(HOLD_AFTER_FORK)
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=redis_server) as service:
        web = service.launch_web(str(configuration))
        wait_until(lambda: "forked" in web.tail(), timeout_s=60, what="gunicorn has forked")
        web.signal(signal.SIGTERM)
        assert web.popen.wait(20) == 0, web.tail()


def test_stopped_while_it_starts(tmp_path: Path, redis_server: RedisServer) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=redis_server) as service:
        web = service.launch_web()
        master = psutil.Process(web.pid)
        (worker,) = wait_until(master.children, timeout_s=60, what="gunicorn has forked")
        wait_until(
            lambda: not has_handlers_of_its_master(worker.pid),
            timeout_s=20,
            what="the worker changes its handlers",
        )
        web.signal(signal.SIGTERM)
        assert web.popen.wait(20) == 0, web.tail()
