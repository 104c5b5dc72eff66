"""Redis that dies, stalls or loses connections while requests run."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, RedisServer, wait_until
from tests.faults.conftest import Reader, Starter, counted, read, wait_served
from tests.faults.tcp_proxy import TcpProxy
from tests.faults.test_clients import waiting
from tests.stand_in_node import StandInNode


@pytest.mark.slow
def test_killed_and_restarted_empty(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, step_ms=50, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        # At its start each worker unregistered what an earlier incarnation might have left.
        told_before = len(node.seen("model/unregister"))
        readers = read(service, 2000, 4)
        service.redis.kill()
        killed_at = time.monotonic()
        status, answer = service.chat("hi", "echo", max_tokens=3)
        assert status == 503
        assert answer["error"]["code"] in ("queue_unavailable", "no_worker")
        assert time.monotonic() - killed_at < 16
        wait_until(lambda: time.monotonic() - killed_at > 2, timeout_s=5, what="two seconds have passed")
        service.redis.start()
        restarted_at = time.monotonic()
        for reader in readers:
            reader.wait_end(killed_at + 30 - time.monotonic())
            assert not reader.done
            assert reader.error is not None
            assert reader.error["code"] == 503
        wait_served(service, timeout_s=20)
        assert time.monotonic() - restarted_at < 20
        for process in service.workers.values():
            process.check_alive()
        # By then a missing lease or record would have counted for the reconciler.
        wait_until(
            lambda: time.monotonic() - restarted_at > 40, timeout_s=60, what="the reconciler would have acted"
        )
        assert len(node.seen("model/unregister")) == told_before
        assert len(node.cids("Test")) == 2


def test_stalled_for_ten_seconds(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, step_ms=50, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        # At its start each worker unregistered what an earlier incarnation might have left.
        told_before = len(node.seen("model/unregister"))
        (before,) = read(service, 400)
        service.redis.kill(signal.SIGSTOP)
        stopped_at = time.monotonic()
        refused = 0
        while time.monotonic() - stopped_at < 10:
            asked_at = time.monotonic()
            status, _ = service.chat("hi", "echo", max_tokens=3)
            assert status == 503
            assert time.monotonic() - asked_at < 16
            refused += 1
        service.redis.kill(signal.SIGCONT)
        assert refused >= 1
        before.wait_end(60)
        if before.done:
            assert before.text == counted(400), "a stall may end a stream but never change it"
        else:
            assert before.error is not None
            assert counted(400).startswith(before.text)
        wait_served(service, timeout_s=20)
        status, answer = service.chat("hi", "echo", max_tokens=50)
        assert answer["choices"][0]["message"]["content"] == counted(50)
        assert len(node.seen("model/unregister")) == told_before


@pytest.mark.slow
def test_a_stall_in_which_events_are_given_up_ends_the_stream_soon_after(start: Starter) -> None:
    """Its job and its claim are there after the stall, and its worker lives."""
    service = start(step_ms=50, slots=1)
    (reader,) = read(service, 5000)
    worker = service.workers["echo-1"]
    service.redis.kill(signal.SIGSTOP)
    for words in ("could not be delivered", "waits for Redis"):
        wait_until(lambda: words in worker.log.read_text(), timeout_s=60, what=words)  # noqa: B023
    service.redis.kill(signal.SIGCONT)
    returned_at = time.monotonic()
    reader.wait_end(20)
    assert not reader.done
    assert reader.error is not None
    assert reader.error["error"]["code"] == "queue_unavailable"
    wait_served(service, timeout_s=20)
    assert time.monotonic() - returned_at < 20
    worker.check_alive()


@pytest.mark.slow
def test_connections_killed_twenty_times_during_a_hundred_streams(start: Starter) -> None:
    service = start(workers=2, step_ms=100, slots=64)
    readers = [Reader(service.stream("count", "echo", max_tokens=300)) for _ in range(100)]
    for round_ in range(20):
        kind = "pubsub" if round_ % 2 else "normal"
        service.redis.client.execute_command("CLIENT", "KILL", "TYPE", kind)
        marks = [len(reader.parts) for reader in readers]
        # Kill the next ones once a token has arrived again.
        wait_until(partial(_gained, readers, marks), timeout_s=20, what=f"tokens after round {round_}")
    for reader in readers:
        reader.wait_end(120)
        assert reader.done, reader.error
        assert reader.text == counted(300)


def _gained(readers: list[Reader], marks: list[int]) -> bool:
    return any(len(r.parts) > mark or r.ended.is_set() for r, mark in zip(readers, marks, strict=True))


# ----- through a proxy


def _cut_since(proxy: TcpProxy, cuts: int) -> bool:
    return proxy.cuts > cuts


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[Deployment, TcpProxy]]:
    """A deployment that reaches its Redis through a proxy."""
    server = RedisServer(tmp_path)
    server.start()
    with TcpProxy(server.port) as proxy:
        catalogue = ECHO_CATALOGUE.format(step_ms=50, slots=16)
        url = f"redis://127.0.0.1:{proxy.port}/0"
        more = {"REDIS_URL": url, "MAX_WAITING": "1000"}
        with Deployment(tmp_path, catalogue=catalogue, redis_server=server, **more) as service:
            service.start("echo")
            yield service, proxy
    server.stop()


@pytest.mark.faults
def test_a_slow_connection_to_redis_changes_nothing(proxied: tuple[Deployment, TcpProxy]) -> None:
    service, proxy = proxied
    proxy.delay_s = 0.2
    readers = read(service, 60, 4)
    for reader in readers:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(60)


@pytest.mark.faults
def test_a_burst_waits_for_connections(proxied: tuple[Deployment, TcpProxy]) -> None:
    """With a round trip of a second, one command in each connection serves 64 requests in a second."""
    service, proxy = proxied
    proxy.delay_s = 0.5
    count = 400
    with ThreadPoolExecutor(count) as pool:
        burst = [pool.submit(service.stream, "count", "echo", max_tokens=2) for _ in range(count)]
        wait_until(
            lambda: sum(one.done() for one in burst) + service.running_tasks() + waiting(service) >= count,
            timeout_s=60,
            what="each request is admitted or answered",
        )
        status, body = service.get("/readyz")
        proxy.delay_s = 0.0
        streams = [one.result() for one in burst]
    refused = [stream.response.read() for stream in streams if stream.status != 200]
    assert refused == []
    assert {stream.text() for stream in streams} == {counted(2)}
    assert body["redis"] == "ok", (status, body)
    assert service.web is not None
    assert "can't be reached" not in service.web.log.read_text()


@pytest.mark.faults
def test_connections_cut_in_the_middle_of_a_message(proxied: tuple[Deployment, TcpProxy]) -> None:
    service, proxy = proxied
    readers = read(service, 200, 4)
    for size in (1000, 3000, 7000, 501):
        cuts = proxy.cuts
        proxy.cut_after_bytes = size
        wait_until(partial(_cut_since, proxy, cuts), timeout_s=20, what=f"a cut after {size} bytes")
        proxy.cut_after_bytes = None
    for reader in readers:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(200)


@pytest.mark.faults
def test_a_half_open_connection_is_noticed(proxied: tuple[Deployment, TcpProxy]) -> None:
    service, proxy = proxied
    (reader,) = read(service, 5000)
    proxy.freeze()
    frozen_at = time.monotonic()
    reader.wait_parts(len(reader.parts) + 20, timeout_s=40)
    assert time.monotonic() - frozen_at < 40
    assert counted(5000).startswith(reader.text)
