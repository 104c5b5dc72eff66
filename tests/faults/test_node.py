"""A node that is away, slow or unwilling (row 15 of the table in docs/operations.md). The service serves on meanwhile."""

import signal
import time

import pytest

from tests.deployment import wait_until
from tests.faults.conftest import Starter
from tests.stand_in_node import StandInNode


@pytest.mark.timeout(300)
def test_down_for_a_minute_and_back_without_memory(start: Starter) -> None:
    with StandInNode() as node:
        service = start(workers=2, NODE_URL=node.url)
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        cids = sorted(node.cids("Test"))
        node.stop()
        down_at = time.monotonic()

        def told() -> bool:
            status, answer = service.chat("hi", "echo", max_tokens=3)
            # a machine that stands still for seconds is no matter of the node's
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


def test_away_from_the_start(start: Starter) -> None:
    with StandInNode() as node:
        node.stop()
        service = start(NODE_URL=node.url)
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        wait_until(lambda: service.worker_rows()[0]["last_error"], timeout_s=20, what="the reason shows")
        assert not service.worker_rows()[0]["registered"]
        node.start()
        node.wait_for(lambda node: len(node.cids("Test")) == 1, 60)


def test_slow(start: Starter) -> None:
    """An answer takes a minute, more than anybody waits: nothing is late but the registration."""
    with StandInNode() as node:
        node.behave("slow", delay_s=60)
        began = time.monotonic()
        service = start(NODE_URL=node.url)
        assert time.monotonic() - began < 60, "the start must not wait for the node"
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        wait_until(lambda: service.worker_rows()[0]["last_error"], timeout_s=20, what="the reason shows")
        worker = service.workers["echo-1"]
        worker.signal(signal.SIGTERM)
        told_at = time.monotonic()
        # two seconds for the node, and two to end after the last request
        assert worker.popen.wait(30) == 0, worker.tail()
        print(f"ended after {time.monotonic() - told_at:.1f} s")


@pytest.mark.parametrize("code", [1001, 5000])
def test_refusing(start: Starter, code: int) -> None:
    with StandInNode() as node:
        node.behave("refusing", code=code)
        service = start(NODE_URL=node.url)
        row = wait_until(
            lambda: next((row for row in service.worker_rows() if row["last_error"]), None),
            timeout_s=20,
            what="the reason shows",
        )
        assert row is not None
        assert str(code) in row["last_error"] or "the test says no" in row["last_error"], row
        assert row["state"] == "ready" and not row["registered"]
        assert service.chat("hi", "echo", max_tokens=3)[0] == 200
        node.behave("ok")
        node.wait_for(lambda node: row["cid"] in node.cids("Test"), 120)
        wait_until(
            lambda: service.worker_rows()[0]["registered"] and not service.worker_rows()[0]["last_error"],
            timeout_s=20,
            what="/v1/workers shows it",
        )
