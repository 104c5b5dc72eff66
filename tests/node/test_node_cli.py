"""`flask --app wsgi node …` with a real Redis and the stand-in node."""

from collections.abc import Callable

import flask
import pytest
from click.testing import Result

from config import Settings
from node.cli import compare, node_commands
from node.client import NodeClient
from node.deployment import Deployment
from node.lock import NodeLock
from node.registration import Registration, default_cid
from protocol.connections import RedisClient
from protocol.leases import Leases, WorkerRecord
from protocol.names import Keys
from tests.stand_in_node import StandInNode

Make = Callable[..., WorkerRecord]
Run = Callable[..., Result]

STALE = default_cid("host-1", "P", "gone")


@pytest.fixture
def run(settings: Settings, deployment: Deployment, leases: Leases, client: RedisClient, keys: Keys) -> Run:
    app = flask.Flask("test")
    lock = NodeLock(client, keys, settings.node_url, settings.service_id)
    app.cli.add_command(node_commands(deployment, leases=leases, lock=lock))
    runner = app.test_cli_runner()
    return lambda *words, **options: runner.invoke(args=["node", *words], **options)


@pytest.fixture
def mixed(node: StandInNode, deployment: Deployment, leases: Leases, record: Make) -> None:
    """One entry of each kind."""
    listed, missing = record("c-ok"), record("c-missing")
    for worker in (listed, missing, record("c-leaving", state="draining")):
        leases.renew_worker(worker)
    NodeClient(node.url).register_model(deployment.registrations([listed])[0])
    for cid in ("c-leaving", STALE, "old-host-1"):
        node.add("P", "Chat", "http://127.0.0.1:1088/v1/chat/completions", cid=cid)
    node.add("P", "Chat", "http://127.0.0.1:1099/v1/chat/completions", cid="d15c4007271b")


def marks(output: str) -> dict[str, str]:
    """cid → mark of the printed table."""
    lines = [line.split() for line in output.splitlines() if "http" in line]
    return {line[3]: line[0] for line in lines}


@pytest.mark.usefixtures("mixed")
def test_list_compares_entries_with_workers(run: Run) -> None:
    result = run("list")

    assert result.exit_code == 0
    assert marks(result.output) == {
        "c-ok": "ok",
        "c-leaving": "changing",
        STALE: "stale",
        "old-host-1": "stale",
        "d15c4007271b": "foreign",
        "c-missing": "missing",
    }


def test_an_empty_list_is_one_line(run: Run) -> None:
    assert "lists nothing" in run("list").output


@pytest.mark.usefixtures("mixed")
def test_prune_removes_only_stale_entries(run: Run, node: StandInNode) -> None:
    result = run("prune")

    assert result.exit_code == 0
    assert STALE in result.output and "old-host-1" in result.output
    assert node.cids() == ["c-ok", "c-leaving", "d15c4007271b"]


@pytest.mark.usefixtures("mixed")
def test_register_project_asks_before_it_drops_others(run: Run, node: StandInNode) -> None:
    refused = run("register-project", input="n\n")
    assert refused.exit_code == 1
    assert "d15c4007271b" in refused.output
    assert not node.seen("project/register")

    assert run("register-project", "--yes").exit_code == 0
    assert sorted(node.cids()) == ["c-missing", "c-ok"]


def test_register_project_without_a_ready_worker_does_nothing(run: Run, node: StandInNode) -> None:
    result = run("register-project", "--yes")

    assert result.exit_code == 1
    assert "no worker is ready" in result.output
    assert not node.calls


@pytest.mark.usefixtures("mixed")
def test_unregister_project_asks_first(run: Run, node: StandInNode) -> None:
    assert run("unregister-project", input="n\n").exit_code == 1
    assert node.cids()

    assert run("unregister-project", "--yes").exit_code == 0
    assert not node.cids()


def test_a_node_that_is_down_is_one_line(run: Run, node: StandInNode) -> None:
    node.stop()

    result = run("list")

    assert result.exit_code == 1
    assert result.output == f"Error: node {node.url} is unreachable: Connection refused\n"


def test_an_entry_with_another_url_is_corrected_by_its_worker(deployment: Deployment, record: Make) -> None:
    entry = Registration("P", "Chat", "http://127.0.0.1:9/v1", 0, "c-1")

    rows = compare([entry], [record("c-1")], deployment)

    assert [(row.mark, row.state) for row in rows] == [("changing", "ready")]


def test_the_entry_of_a_lost_worker_is_stale_with_any_cid(deployment: Deployment, record: Make) -> None:
    entry = Registration("P", "Chat", "http://127.0.0.1:9/v1", 0, "by-hand")

    rows = compare([entry], [record("by-hand", state="lost")], deployment)

    assert [row.mark for row in rows] == ["stale"]
