"""A node that is away, slow or refuses. The service keeps serving."""

import signal
import time
from typing import Any

import pytest

from tests.deployment import Deployment, wait_until
from tests.faults.conftest import Starter
from tests.stand_in_node import StandInNode


def wait_reason(service: Deployment, part: str = "") -> dict[str, Any]:
    """Wait until /v1/workers says why the only worker is not registered (`part` is in it); return the row."""

    def told() -> dict[str, Any] | None:
        (row,) = service.worker_rows()
        return row if row["last_error"] and part in row["last_error"] else None

    return wait_until(told, timeout_s=30, what=f"the reason ({part}) shows in /v1/workers") or {}


@pytest.mark.slow
def test_down_for_a_minute_and_back_without_its_entries(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        cids = sorted(node.cids("Test"))
        node.stop()
        down_at = time.monotonic()

        def told() -> bool:
            # The answer takes two seconds: more requests would only cost processor time.
            status, answer = service.chat("hi", "echo", max_tokens=100)
            # "queue_unavailable": the machine paused for seconds, which has nothing to do with the node.
            assert status == 200 or answer["error"]["code"] == "queue_unavailable", answer
            shown = all(row["last_error"] for row in service.worker_rows())
            return shown and time.monotonic() - down_at > 60

        wait_until(told, timeout_s=120, what="a minute, and the reason shows in /v1/workers")
        assert all(row["state"] == "ready" for row in service.worker_rows())
        node.start(forget=True)
        up_at = time.monotonic()
        node.wait_for(lambda node: sorted(node.cids("Test")) == cids, 120)
        print(f"registered again after {time.monotonic() - up_at:.1f} s")
        wait_until(
            lambda: all(r["registered"] and not r["last_error"] for r in service.worker_rows()),
            timeout_s=20,
            what="/v1/workers shows it",
        )


def test_away_at_start_and_at_stop(start: Starter) -> None:
    with StandInNode() as node:
        node.stop()
        service = start(NODE_URL=node.url)
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        row = wait_reason(service)
        assert row["state"] == "ready" and not row["registered"]
        node.start()
        node.wait_for(lambda node: node.cids("Test") == [row["cid"]], 60)
        node.stop()
        began = time.monotonic()
        worker = service.workers["echo-1"]
        worker.signal(signal.SIGTERM)
        assert worker.popen.wait(20) == 0, worker.tail()
        assert time.monotonic() - began < 10


def test_slow(start: Starter) -> None:
    """Each answer takes a minute, longer than the registrar waits. Only the registration is late."""
    with StandInNode() as node:
        node.behave("slow", delay_s=60)
        began = time.monotonic()
        service = start(NODE_URL=node.url)
        assert time.monotonic() - began < 60, "the start must not wait for the node"
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        wait_reason(service)
        worker = service.workers["echo-1"]
        worker.signal(signal.SIGTERM)
        told_at = time.monotonic()
        # Two seconds for the node, two to exit after the last request, and a margin.
        assert worker.popen.wait(30) == 0, worker.tail()
        print(f"ended after {time.monotonic() - told_at:.1f} s")


def test_refusing(start: Starter) -> None:
    with StandInNode() as node:
        node.behave("refusing", code=1001)
        service = start(NODE_URL=node.url)
        for code in (1001, 5000):
            node.behave("refusing", code=code)
            row = wait_reason(service, f"code {code}")
            assert row["state"] == "ready" and not row["registered"]
            assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        node.behave("ok")
        node.wait_for(lambda node: row["cid"] in node.cids("Test"), 120)
        wait_until(
            lambda: service.worker_rows()[0]["registered"] and not service.worker_rows()[0]["last_error"],
            timeout_s=20,
            what="/v1/workers shows it",
        )


@pytest.mark.slow
def test_entries_of_a_former_identity_are_removed(start: Starter) -> None:
    """Everything was killed, and the host got another name: nobody knows the old cid any more."""
    with StandInNode() as node:
        service = start(NODE_URL=node.url, SERVICE_ID="former")
        node.wait_for(lambda node: node.cids("Test"), 20)
        (former,) = node.cids("Test")
        node.add("Test", "echo", "http://127.0.0.1:9/v1/chat/completions", cid="foreign")
        assert service.web is not None
        for process in (*service.workers.values(), service.web):
            process.end()
        service.workers.clear()
        service._environment["SERVICE_ID"] = "present"
        service.start_web()
        service.start_worker("echo")
        node.wait_for(lambda node: former not in node.cids("Test"), 120)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 30)
        assert "foreign" in node.cids("Test")
