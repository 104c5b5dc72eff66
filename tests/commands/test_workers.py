"""`flask --app wsgi workers ...` with real workers, a real Redis, and the stand-in node."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.conftest import flask, succeeds, table
from tests.deployment import ECHO_CATALOGUE, RECEIVED, Deployment, wait_until
from tests.faults.conftest import counted, read
from tests.stand_in_node import StandInNode

HOST = os.uname().nodename
FIRST, SECOND = f"echo-1@{HOST}", f"echo-2@{HOST}"


@pytest.fixture
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture
def service(tmp_path: Path, node: StandInNode) -> Iterator[Deployment]:
    """Two workers of one model, registered with the node; each takes two requests at a time."""
    catalogue = ECHO_CATALOGUE.format(step_ms=20, slots=2)
    with Deployment(tmp_path, catalogue=catalogue, NODE_URL=node.url, PUBLIC_URL="http://models") as service:
        service.start("echo", "echo")
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 30)
        yield service


def listed(service: Deployment) -> dict[str, dict[str, str]]:
    return {row["NAME"]: row for row in table(succeeds(service, "workers", "list"))}


@pytest.mark.slow
def test_a_drained_worker_finishes_takes_nothing_and_waits_over_a_restart(
    service: Deployment, node: StandInNode
) -> None:
    rows = {row["name"]: row for row in service.worker_rows()}
    assert sorted(rows) == [FIRST, SECOND]
    readers = read(service, 800, 4)

    assert FIRST in succeeds(service, "workers", "drain", "echo-1")
    service.wait_worker("echo-1", "draining", timeout_s=20)
    node.wait_for(lambda node: node.cids("Test") == [rows[SECOND]["cid"]], 20)
    assert not any(reader.ended.is_set() for reader in readers), "the node is told while the streams run"
    for reader in readers:
        reader.wait_end(60)
        assert reader.done and reader.text == counted(800), "what runs is finished"
    service.wait_worker("echo-1", "drained", timeout_s=20)

    log = service.workers["echo-1"].log
    before = len(RECEIVED.findall(log.read_text()))
    for _ in range(6):
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
    assert len(RECEIVED.findall(log.read_text())) == before, "it takes nothing new"

    shown = listed(service)
    assert (shown[FIRST]["STATE"], shown[FIRST]["DRAIN"], shown[FIRST]["REGISTERED"]) == (
        "drained",
        "yes",
        "no",
    )
    assert (shown[SECOND]["STATE"], shown[SECOND]["DRAIN"], shown[SECOND]["REGISTERED"]) == (
        "ready",
        "no",
        "yes",
    )
    assert any(FIRST in warning for warning in service.get("/readyz")[1]["warnings"])

    service.workers["echo-1"].signal(signal.SIGTERM)
    assert service.workers["echo-1"].popen.wait(40) == 0, service.workers["echo-1"].tail()
    assert listed(service)[FIRST]["STATE"] == "stopped"
    service.start_worker("echo", "echo-1")
    service.wait_worker("echo-1", "drained")
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200
    assert node.cids("Test") == [rows[SECOND]["cid"]]

    assert succeeds(service, "workers", "resume", FIRST) == f"{FIRST}: resumed\n"
    service.wait_worker("echo-1", "ready", timeout_s=20)
    node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
    readers = read(service, 50, 4)
    for reader in readers:
        reader.wait_end(60)
        assert reader.done
    assert service.get("/readyz")[1]["warnings"] == []


@pytest.mark.slow
def test_all_workers_are_replaced_under_load_and_no_request_is_lost(
    service: Deployment, node: StandInNode
) -> None:
    done = threading.Event()
    answers: list[tuple[int, str]] = []

    def call() -> None:
        while not done.is_set():
            status, body = service.chat("count", "echo", max_tokens=30)
            answers.append((status, body["choices"][0]["message"]["content"] if status == 200 else str(body)))

    def go_on(count: int) -> None:
        enough = len(answers) + count
        wait_until(lambda: len(answers) >= enough, timeout_s=60, what="requests are served")

    clients = [threading.Thread(target=call) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        for name in ("echo-1", "echo-2"):
            pid = service.workers[name].pid
            assert f"{name}@{HOST}: drained" in succeeds(service, "workers", "drain", name, "--wait")
            service.workers[name].signal(signal.SIGTERM)
            assert service.workers[name].popen.wait(40) == 0, service.workers[name].tail()
            service.start_worker("echo", name)
            service.wait_worker(name, "drained")
            succeeds(service, "workers", "resume", name)
            assert service.wait_worker(name, "ready", timeout_s=20)["pid"] != pid
            go_on(10)
    finally:
        done.set()
        for client in clients:
            client.join(100)
    assert len(answers) > 20
    assert set(answers) == {(200, counted(30))}
    node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)


@pytest.mark.slow
def test_with_all_drained_the_model_is_missing_until_all_are_resumed(service: Deployment) -> None:
    succeeds(service, "workers", "drain", "--all", "--wait")
    wait_until(lambda: service.get("/readyz")[0] == 503, timeout_s=20, what="the model has no worker")
    status, body = service.chat("hi", "echo", max_tokens=3)
    assert (status, body["error"]["code"]) == (503, "no_worker")
    succeeds(service, "workers", "resume", "--all")
    service.wait_ready("echo", "echo")
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200
    assert "was not under drain" in succeeds(service, "workers", "resume", "echo-1")


@pytest.mark.slow
def test_names_that_are_wrong_are_one_line(service: Deployment) -> None:
    for words, reason in [
        (("drain", "echo-9"), f"there is no worker 'echo-9'; there are: {FIRST}, {SECOND}"),
        (("resume", "echo-9"), f"there is no worker 'echo-9'; there are: {FIRST}, {SECOND}"),
        (("drain",), "give names of workers, or --all"),
        (("drain", "echo-1", "--all"), "give names of workers, or --all"),
    ]:
        done = flask(service, "workers", *words)
        assert done.returncode != 0
        assert done.stderr == f"Error: {reason}\n"
    assert {row["DRAIN"] for row in listed(service).values()} == {"no"}
