"""What workers register with the node. tests/faults/test_node.py has nodes that are hard to reach."""

import signal
from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.stand_in_node import StandInNode

CATALOGUE = ECHO_CATALOGUE.format(step_ms=5, slots=4)


def test_start_and_stop(tmp_path: Path) -> None:
    with (
        StandInNode() as node,
        Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, NODE_URL=node.url) as service,
    ):
        service.start("echo", "echo-images")
        node.wait_for(lambda node: len(node.cids("Test")) == 2, 20)
        entries = {entry["model"]: entry for entry in node.entries("Test")}
        assert entries["echo"]["type"] == 0
        assert entries["echo"]["api"] == f"{service.url}/v1/chat/completions"
        assert entries["echo-images"]["type"] == 1
        assert entries["echo-images"]["api"] == f"{service.url}/v1/images/generations"
        # What a worker told the node shows once the web process has looked at the leases again.
        wait_until(
            lambda: all(row["registered"] for row in service.worker_rows()),
            timeout_s=10,
            what="both show as registered",
        )
        first_cid = entries["echo"]["cid"]
        service.workers["echo-1"].signal(signal.SIGTERM)
        node.wait_for(lambda node: first_cid not in node.cids("Test"), 10)
        assert service.workers["echo-1"].popen.wait(20) == 0
        service.start_worker("echo", "echo-1")
        node.wait_for(lambda node: first_cid in node.cids("Test"), 30)
        assert not node.seen("project/register", "project/unregister"), "these remove the others' entries"


def test_a_service_that_listens_everywhere_is_registered_at_the_loopback(tmp_path: Path) -> None:
    with (
        StandInNode() as node,
        Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None, NODE_URL=node.url) as service,
    ):
        service._environment["BIND"] = f"0.0.0.0:{service.port}"
        service.start("echo")
        node.wait_for(lambda node: node.cids("Test"), 20)
        (entry,) = node.entries("Test")
        assert entry["api"] == f"http://127.0.0.1:{service.port}/v1/chat/completions"


def test_a_worker_is_not_registered_at_the_url_of_another_deployment(tmp_path: Path) -> None:
    """The other one has a model of that name in another namespace. Users of the node would get its errors."""
    own_catalogue = CATALOGUE.replace('project = "Test"', 'project = "Own"')
    with (
        StandInNode() as node,
        Deployment(tmp_path / "other", catalogue=CATALOGUE, redis_server=None, NODE_URL="") as other,
        Deployment(
            tmp_path / "own",
            catalogue=own_catalogue,
            redis_server=None,
            NODE_URL=node.url,
            SERVICE_URL=other.url,
        ) as service,
    ):
        other.start()
        service.start("echo")
        complaint = f"SERVICE_URL {other.url} is not answered by a web process of namespace 'Own'"
        wait_until(
            lambda: any(complaint in warning for warning in service.get("/readyz")[1]["warnings"]),
            timeout_s=20,
            what="the reason shows",
        )
        assert not service.worker_rows()[0]["registered"]
        assert not node.seen("model/register")
