"""Workers that are stopped, paused or killed while another one serves, or before they are ready."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config import Settings
from protocol.celery_app import create_celery
from protocol.names import Keys
from protocol.task_messages import TaskMessages
from tests.deployment import ECHO_CATALOGUE, Deployment, demo_catalogue, free_port, wait_until
from tests.faults.conftest import Starter, check_lost, counted, read, wait_served
from tests.faults.tcp_proxy import TcpProxy
from tests.stand_in_node import StandInNode


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
            "the node must be told before the streams end"
        )
        for reader in readers:
            reader.wait_end(60)
            assert reader.done
            assert reader.text == counted(300)
        ended_at = time.monotonic()
        assert leaving.popen.wait(30) == 0, leaving.tail()
        assert time.monotonic() - ended_at < 4
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200, "the other worker must go on serving"
        wait_until(
            lambda: [worker["state"] for worker in service.worker_rows()] == ["ready"],
            timeout_s=20,
            what="the stopped worker is no longer listed",
        )


def test_what_waits_for_the_only_worker_fails_soon_after_it_was_stopped(start: Starter) -> None:
    """Without this, requests admitted just before the stop waited for their whole deadline."""
    service = start(step_ms=50, slots=1)
    (running,) = read(service, 40)
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(service.chat, "hi", "echo", max_tokens=3) for _ in range(5)]
        wait_until(
            lambda: service.redis.client.zcard("Test:waiting:echo") == 5,
            timeout_s=20,
            what="all requests wait",
        )
        began = time.monotonic()
        service.workers["echo-1"].signal(signal.SIGTERM)
        for answer in waiting:
            status, body = answer.result(timeout=30)
            assert (status, body["error"]["code"]) == (503, "no_worker")
        assert time.monotonic() - began < 20
    running.wait_end(30)
    assert running.done and running.text == counted(40), "what runs is finished"


def test_many_signals_stop_it_as_one_does(start: Starter) -> None:
    """A killed supervisor causes one for each of its threads, microseconds apart."""
    service = start(workers=4, DRAIN_S="1")
    for worker in service.workers.values():
        began = time.monotonic()
        for number in range(100):
            if time.monotonic() - began > 0.2:
                break  # a worker that is already ending has no handlers any more
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
        wait_until(lambda: not service.worker_rows(), timeout_s=20, what="its lease is released")


def test_stopped_after_redis_was_lost_before_it_was_ready(tmp_path: Path) -> None:
    """While Redis is away, Celery repeats its announcement without end, also after SIGTERM."""
    service = Deployment(tmp_path, catalogue=ECHO_CATALOGUE.format(step_ms=5, slots=4))
    with service, TcpProxy(service.redis.port) as proxy:
        service.redis.start()
        proxy.sever_at = b"worker.online"
        name = service.start_worker("echo", REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0", DRAIN_S="1")
        assert proxy.severed.wait(60), service.workers[name].tail()
        service.workers[name].signal(signal.SIGTERM)
        assert service.workers[name].popen.wait(40) == 0, service.workers[name].tail()


def test_stopped_for_twenty_seconds(start: Starter) -> None:
    """It is lost and unregistered, nothing of it arrives late, and it comes back by itself."""
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
            lambda: sum(reader.ended.is_set() for reader in readers) == 2,
            timeout_s=30,
            what="half of the streams fail",
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
            what="it drops the requests that were given up",
        )
        assert [len(reader.parts) for reader in lost] == parts
        for reader in readers:
            reader.stream.close()


def test_a_request_received_by_a_paused_worker_is_served_by_the_other(start: Starter) -> None:
    service = start(workers=2, step_ms=5)
    service.workers["echo-1"].signal(signal.SIGSTOP)
    began = time.monotonic()
    # The pending BRPOP of a paused worker receives one of the next messages, which must then be sent again.
    for _ in range(3):
        status, answer = service.chat("hi", "echo", max_tokens=3)
        assert status == 200, answer
    assert time.monotonic() - began < 40
    service.workers["echo-1"].signal(signal.SIGCONT)


def test_redelivered_tasks_are_generated_once(start: Starter) -> None:
    """A second message for each running request, as the request monitor may send."""
    service = start(workers=2, step_ms=50)
    readers = read(service, 150, 4)
    redis, keys = service.redis.client, Keys.of("Test")
    messages = TaskMessages(create_celery(Settings(), keys))
    for claim in redis.keys("Test:claim:*"):
        request_id = claim.decode().removeprefix(keys.claim(""))
        redis.lpush(keys.queue_list("echo"), messages.make(request_id, keys.queue("echo"), copy=1))
    for reader in readers:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(150)

    def received() -> int:
        return sum(worker.log.read_text().count("received") for worker in service.workers.values())

    wait_until(lambda: received() == 2 * len(readers), timeout_s=20, what="tasks are delivered twice")


def test_killed_and_staying_down_is_unregistered(start: Starter) -> None:
    with StandInNode() as node:
        node.add("Other", "x", "http://127.0.0.1:1/x", cid="foreign")
        node.add("Test", "echo", "http://127.0.0.1:1/x", cid="unknown")
        service = start(workers=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 3, 20)
        row = service.wait_worker("echo-1", "ready")
        service.workers["echo-1"].end()
        node.wait_for(lambda node: row["cid"] not in node.cids("Test"), 30)
        assert len(node.cids("Test")) == 2
        assert node.cids("Other") == ["foreign"]
        assert not node.seen("project/unregister", "project/register")
        service.stop()


@pytest.mark.parametrize(("refusal", "reason"), [("replica", "read only replica"), ("full", "maxmemory")])
def test_a_redis_that_refuses_writes_ends_no_worker(start: Starter, refusal: str, reason: str) -> None:
    """It was demoted, or is full, for longer than a lease lasts."""
    service = start(workers=2)
    redis = service.redis.client
    if refusal == "replica":
        redis.replicaof("127.0.0.1", free_port())
    else:
        redis.config_set("maxmemory", 1)
    wait_until(
        lambda: all(worker["state"] == "lost" for worker in service.worker_rows()),
        timeout_s=40,
        what="no lease is renewed",
    )
    assert service.chat("hi", "echo", max_tokens=3)[0] == 503
    status, body = service.get("/readyz")
    assert status == 503 and body["redis"].startswith("refuses writes: ") and reason in body["redis"]
    redis.replicaof("NO", "ONE")
    redis.config_set("maxmemory", 0)
    wait_served(service, timeout_s=40)
    for worker in service.workers.values():
        worker.check_alive()
        assert "Unrecoverable" not in worker.log.read_text()
