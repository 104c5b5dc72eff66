"""Two workers with one cid: a copied WORKER_CID, or a worker that was replaced while it was paused."""

import re
import signal

import pytest

from config import EXIT_CONFIGURATION
from tests.deployment import wait_until
from tests.faults.conftest import Starter, check_lost, read, wait_served
from tests.stand_in_node import StandInNode


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_the_worker_that_started_first_leaves_and_changes_nothing(start: Starter, paused: bool) -> None:
    with StandInNode() as node:
        service = start(step_ms=50, NODE_URL=node.url, WORKER_CID="mine")
        node.wait_for(lambda node: node.cids("Test") == ["mine"], 20)
        (reader,) = read(service, 50_000)
        first = service.workers["echo-1"]
        if paused:
            first.signal(signal.SIGSTOP)
        second = service.start_worker("echo")
        check_lost(reader, 30)
        service.wait_worker(second, "ready")
        node.wait_for(lambda node: node.cids("Test") == ["mine"], 20)
        wait_served(service, timeout_s=30)
        if paused:
            first.signal(signal.SIGCONT)
        assert first.popen.wait(10) == EXIT_CONFIGURATION, first.tail()
        assert "a newer worker with the same cid has started" in first.tail()
        assert "each deployment on this Redis a NAMESPACE" in first.tail()

        served_by = [(row["cid"], row["pid"], row["state"]) for row in service.worker_rows()]
        assert served_by == [("mine", service.workers[second].pid, "ready")]
        wait_until(lambda: service.worker_rows()[0]["registered"], timeout_s=20, what="it is registered")
        wait_served(service)
        calls = " ".join(call.name for call in node.seen("model/register", "model/unregister"))
        # each removes at its start what an earlier incarnation may have left, unless it serves at once
        assert re.fullmatch("(model/unregister )?model/register (model/unregister )?model/register", calls)

        service.workers[second].signal(signal.SIGTERM)
        assert service.workers[second].popen.wait(30) == 0, service.workers[second].tail()
        assert not node.cids("Test")
        wait_until(lambda: not service.worker_rows(), timeout_s=20, what="its lease is released")
