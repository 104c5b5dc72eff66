"""Workers that die, stop, hang or leave while requests run (rows 1-4, 16 and 18 of the table in docs/operations.md)."""

import signal
import time
from pathlib import Path

import pytest

from tests.deployment import Deployment, demo_catalogue, wait_until
from tests.faults.conftest import Reader, Starter, counted, read
from tests.faults.tcp_proxy import TcpProxy
from tests.stand_in_node import StandInNode


def check_lost(reader: Reader, within_s: float) -> None:
    reader.wait_end(within_s)
    assert not reader.done, "a cut answer must not look complete"
    assert reader.error is not None, "the caller must be told"
    assert reader.error["error"]["code"] == "worker_lost"
    assert reader.error["code"] == 503


def test_killed_mid_stream(start: Starter) -> None:
    service = start(step_ms=50)
    readers = read(service, 2000, 4)
    worker = service.workers["echo-1"]
    worker.end()
    for reader in readers:
        check_lost(reader, 30)
    status, answer = service.chat("hi", "echo", max_tokens=2)
    assert status == 503
    assert answer["error"]["code"] == "no_worker"
    service.start_worker("echo", "echo-1")
    service.wait_worker("echo-1", "ready")
    wait_until(lambda: service.chat("hi", "echo", max_tokens=3)[0] == 200, timeout_s=10, what="next request")
    wait_until(
        lambda: service.wait_worker("echo-1", "ready")["running"] == 0,
        timeout_s=20,
        what="nothing runs: what was cut, 100 s of it, is not generated again",
    )


def test_restarted_faster_than_its_lease_lapses(start: Starter) -> None:
    service = start(step_ms=50)
    readers = read(service, 2000, 2)
    service.workers["echo-1"].end()
    service.start_worker("echo", "echo-1")
    for reader in readers:
        check_lost(reader, 30)
    service.wait_worker("echo-1", "ready")
    wait_until(lambda: service.chat("hi", "echo", max_tokens=3)[0] == 200, timeout_s=10, what="next request")


def test_sigterm_with_running_streams(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, step_ms=50, slots=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        readers = read(service, 300, 4)
        leaving = service.workers["echo-1"]
        row = service.wait_worker("echo-1", "ready")
        began = time.monotonic()
        leaving.signal(signal.SIGTERM)
        node.wait_for(lambda node: row["cid"] not in node.cids("Test"), 10)
        told = [call.at for call in node.seen("model/unregister") if call.body["cid"] == row["cid"]]
        assert told[-1] - began < 4
        assert not any(reader.ended.is_set() for reader in readers), (
            "the node is told before the work is done"
        )
        for reader in readers:
            reader.wait_end(60)
            assert reader.done
            assert reader.text == counted(300)
        ended_at = time.monotonic()
        assert leaving.popen.wait(30) == 0, leaving.tail()
        assert time.monotonic() - ended_at < 4
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200, "the other worker serves on"
        wait_until(
            lambda: [worker["state"] for worker in service.worker_rows()] == ["ready"],
            timeout_s=20,
            what="the one that left is forgotten",
        )


def test_drain_is_bounded(start: Starter) -> None:
    service = start(step_ms=50, DRAIN_S="1")
    (reader,) = read(service, 5000)
    service.workers["echo-1"].signal(signal.SIGTERM)
    reader.wait_end(20)
    assert reader.error is not None
    assert reader.error["error"]["code"] == "shutting_down"
    assert service.workers["echo-1"].popen.wait(20) == 0


def test_many_signals_stop_it_as_one_does(start: Starter) -> None:
    """A supervisor that is killed sends one for each of its threads, microseconds apart."""
    service = start(workers=4, DRAIN_S="1")
    for worker in service.workers.values():
        began = time.monotonic()
        for number in range(100):
            if time.monotonic() - began > 0.2:
                break  # one that ends already has no handlers any more
            again_at = time.perf_counter() + number * 2e-6
            worker.signal(signal.SIGTERM)
            while time.perf_counter() < again_at:
                pass
    for worker in service.workers.values():
        assert worker.popen.wait(40) == 0, worker.tail()


def test_stopped_while_it_loads(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=demo_catalogue()) as service:
        service.start()
        name = service.start_worker("demo-chat")
        service.wait_worker(name, "loading")
        service.workers[name].signal(signal.SIGTERM)
        assert service.workers[name].popen.wait(20) == 0, service.workers[name].tail()
        wait_until(lambda: not service.worker_rows(), timeout_s=20, what="its lease has ended with it")


def test_stopped_after_redis_went_before_it_was_ready(start: Starter) -> None:
    """Celery, which says at its start that it is online, says so again and again: SIGTERM doesn't end that."""
    service = start()
    with TcpProxy(service.redis.port) as proxy:
        proxy.sever_at = b"worker.online"
        name = service.start_worker("echo", REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0", DRAIN_S="1")
        assert proxy.severed.wait(60), service.workers[name].tail()
        service.workers[name].signal(signal.SIGTERM)
        assert service.workers[name].popen.wait(40) == 0, service.workers[name].tail()


def test_stopped_for_twenty_seconds(start: Starter) -> None:
    """SIGSTOP, then SIGCONT: lost, unregistered, nothing of it reaches anyone late, and it comes back by itself."""
    with StandInNode() as node:
        service = start(workers=2, step_ms=50, slots=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        rows = {name: service.wait_worker(name, "ready") for name in service.workers}
        readers = read(service, 3000, 4)
        frozen = service.workers["echo-1"]
        cid = rows["echo-1"]["cid"]
        frozen.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        node.wait_for(lambda node: cid not in node.cids("Test"), 30)
        wait_until(
            lambda: sum(reader.ended.is_set() for reader in readers) == 2, timeout_s=30, what="half fail"
        )
        lost = [reader for reader in readers if reader.ended.is_set()]
        for reader in lost:
            check_lost(reader, 1)
        assert service.wait_worker("echo-1", "lost", timeout_s=20)["cid"] == cid
        wait_until(lambda: time.monotonic() - stopped_at > 20, timeout_s=30, what="twenty seconds")
        parts = [len(reader.parts) for reader in lost]
        frozen.signal(signal.SIGCONT)
        service.wait_worker("echo-1", "ready", timeout_s=20)
        node.wait_for(lambda node: cid in node.cids("Test"), 30)
        wait_until(
            lambda: service.wait_worker("echo-1", "ready")["running"] == 0,
            timeout_s=20,
            what="late work is dropped",
        )
        assert [len(reader.parts) for reader in lost] == parts
        for reader in readers:
            reader.stream.close()


def test_a_request_swallowed_by_a_stopped_worker_is_served_by_the_other(start: Starter) -> None:
    service = start(workers=2, step_ms=5)
    service.workers["echo-1"].signal(signal.SIGSTOP)
    began = time.monotonic()
    # a stopped worker's pending BRPOP takes one of the next messages: it is sent again
    for _ in range(3):
        status, answer = service.chat("hi", "echo", max_tokens=3)
        assert status == 200, answer
    assert time.monotonic() - began < 40
    service.workers["echo-1"].signal(signal.SIGCONT)


def test_redelivered_tasks_are_generated_once(start: Starter) -> None:
    """One CLIENT KILL hands every running task out again, as the visibility timeout would; the claim stops the copies."""
    service = start(workers=2, step_ms=50)
    readers = read(service, 150, 4)
    service.redis.client.execute_command("CLIENT", "KILL", "TYPE", "normal")
    for reader in readers:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(150)

    def received() -> int:
        return sum(worker.log.read_text().count("received") for worker in service.workers.values())

    wait_until(lambda: received() > len(readers), timeout_s=20, what="copies, or this test tests nothing")


def test_killed_and_staying_down_is_unregistered(start: Starter) -> None:
    with StandInNode() as node:
        node.add("Other", "x", "http://127.0.0.1:1/x", cid="foreign")
        node.add("Test", "echo", "http://127.0.0.1:1/x", cid="somebody-elses")
        service = start(workers=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 3, 20)
        row = service.wait_worker("echo-1", "ready")
        service.workers["echo-1"].end()
        node.wait_for(lambda node: row["cid"] not in node.cids("Test"), 30)
        assert len(node.cids("Test")) == 2
        assert node.cids("Other") == ["foreign"]
        assert not node.seen("project/unregister", "project/register")
        service.stop()


@pytest.mark.parametrize(("fault", "code"), [("raise", "engine_error"), ("out of memory", "out_of_memory")])
def test_a_request_that_the_engine_fails_on(start: Starter, fault: str, code: str) -> None:
    service = start()
    began = time.monotonic()
    status, answer = service.chat(fault, "echo")
    assert status == 500
    assert answer["error"]["code"] == code
    assert time.monotonic() - began < 10
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200


@pytest.mark.parametrize(("fault", "reason"), [("hang", "no progress"), ("die", "has died")])
def test_an_engine_that_hangs_or_dies_is_replaced(start: Starter, fault: str, reason: str) -> None:
    service = start(step_ms=5, HANG_S="3")
    (other,) = read(service, 5000)
    status, answer = service.chat(fault, "echo")
    assert status == 503
    assert answer["error"]["code"] == "worker_lost"
    other.wait_end(10)
    assert other.error is not None
    assert other.error["error"]["code"] == "worker_lost"
    worker = service.workers["echo-1"]
    assert worker.popen.wait(20) not in (0, 78), "a supervisor must start it again"
    assert reason in worker.tail()
    service.start_worker("echo", "echo-1")
    service.wait_worker("echo-1", "ready")
    wait_until(lambda: service.chat("hi", "echo", max_tokens=3)[0] == 200, timeout_s=10, what="next request")
