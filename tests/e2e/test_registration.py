"""What the node is told over a worker's life: start, stop, and a node that is away or slow meanwhile."""

import signal
import time
from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.stand_in_node import StandInNode

CATALOGUE = ECHO_CATALOGUE.format(step_ms=5, slots=4)


def test_start_and_stop(tmp_path: Path) -> None:
    with (
        StandInNode() as node,
        Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, NODE_URL=node.url) as service,
    ):
        service.start("echo", "echo-pictures")
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        entries = {entry["model"]: entry for entry in node.entries("Test")}
        assert entries["echo"]["type"] == 0
        assert entries["echo"]["api"] == f"{service.url}/v1/chat/completions"
        assert entries["echo-pictures"]["type"] == 1
        assert entries["echo-pictures"]["api"] == f"{service.url}/v1/images/generations"
        # what the node was told shows with the next look at the leases
        wait_until(
            lambda: all(row["registered"] for row in service.worker_rows()), timeout_s=10, what="both show it"
        )
        first_cid = entries["echo"]["cid"]
        service.workers["echo-1"].signal(signal.SIGTERM)
        node.wait_for(lambda node: first_cid not in node.cids("Test"), 10)
        assert service.workers["echo-1"].popen.wait(20) == 0
        service.start_worker("echo", "echo-1")
        node.wait_for(lambda node: first_cid in node.cids("Test"), 30)
        assert not node.seen("project/register", "project/unregister"), "those wipe everybody else's entries"


def test_a_node_that_is_away_delays_nothing(tmp_path: Path) -> None:
    with StandInNode() as node:
        url = node.url
        node.stop()
        with Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, NODE_URL=url) as service:
            service.start("echo")
            assert service.chat("hi", "echo", max_tokens=2)[0] == 200
            row = service.wait_worker("echo-1", "ready")
            assert not row["registered"]
            node.start()
            node.wait_for(lambda node: row["cid"] in node.cids("Test"), 60)
            node.stop()
            began = time.monotonic()
            service.workers["echo-1"].signal(signal.SIGTERM)
            assert service.workers["echo-1"].popen.wait(20) == 0
            assert time.monotonic() - began < 10
            node.start()


def test_why_a_worker_is_not_registered_shows(tmp_path: Path) -> None:
    with StandInNode() as node:
        node.behave("refusing", code=1001)
        with Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, NODE_URL=node.url) as service:
            service.start("echo")
            node.wait_for(lambda node: node.seen("model/register"), 20)
            row = wait_until(
                lambda: next((w for w in service.worker_rows() if "1001" in w["last_error"]), None),
                timeout_s=15,
                what="the node's refusal shows in /v1/workers",
            )
            assert row is not None
            assert not row["registered"]
            node.behave("ok")
            node.wait_for(lambda node: row["cid"] in node.cids("Test"), 60)
