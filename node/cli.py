"""`flask --app wsgi node ...`: shows and corrects the node's list."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click
from flask.cli import AppGroup
from redis.exceptions import RedisError

from node.client import NodeClient, NodeError
from node.deployment import Deployment, Mark, worker_of
from node.lock import NodeLock
from node.registration import Registration
from node.table import print_table
from protocol.leases import Leases, WorkerRecord

TIMEOUT_S = 15.0


MEANINGS = {
    Mark.OK: "a ready worker stands for it",
    Mark.MISSING: "a ready worker that the node doesn't list yet",
    Mark.CHANGING: "its worker lives and corrects the entry",
    Mark.STALE: "ours, but no living worker stands for it: `node prune` removes it",
    Mark.FOREIGN: "not of this deployment",
}


class Row(NamedTuple):
    """One entry and what is known of its worker. `state`: the worker's, "" when none is known."""

    mark: Mark
    entry: Registration
    state: str


def compare(entries: list[Registration], records: list[WorkerRecord], deployment: Deployment) -> list[Row]:
    """The node's entries in its order, then those that are missing."""
    rows = [
        Row(deployment.mark(entry, records), entry, _state(worker_of(entry, records))) for entry in entries
    ]
    listed = {(entry.project, entry.model, entry.cid) for entry in entries}
    missing = [
        entry
        for entry in deployment.registrations(records)
        if (entry.project, entry.model, entry.cid) not in listed
    ]
    return rows + [Row(Mark.MISSING, entry, "ready") for entry in missing]


def _state(worker: WorkerRecord | None) -> str:
    return worker.state if worker is not None else ""


def node_commands(deployment: Deployment, *, leases: Leases, lock: NodeLock) -> AppGroup:
    """Make the command group `node`. Nothing connects before a command runs."""
    group = AppGroup(
        "node", help="Show and correct what the network node lists.", short_help="The network node."
    )
    admin = NodeAdmin(deployment, leases, lock)

    @group.command("list")
    def list_entries() -> None:
        """Compare what the node lists with the living workers."""
        with _errors_as_messages():
            admin.list_entries()

    @group.command("register-project")
    @click.option("--yes", is_flag=True, help="Drop entries of others from the project without asking.")
    def register_project(yes: bool) -> None:
        """Replace the project's whole list by the workers that are ready now."""
        with _errors_as_messages():
            admin.register_project(yes)

    @group.command("unregister-project")
    @click.option("--yes", is_flag=True, help="Don't ask.")
    def unregister_project(yes: bool) -> None:
        """Remove the project with everybody's models. Living workers register again within a minute."""
        with _errors_as_messages():
            admin.unregister_project(yes)

    @group.command("prune")
    def prune() -> None:
        """Remove our stale entries from the node; the reconciler does so too, after a longer look."""
        with _errors_as_messages():
            admin.prune()

    return group


class NodeAdmin:
    """What the commands do. Methods raise NodeError, redis.RedisError and click.ClickException."""

    def __init__(self, deployment: Deployment, leases: Leases, lock: NodeLock) -> None:
        self._deployment = deployment
        self._leases = leases
        self._lock = lock

    def list_entries(self) -> None:
        node = self._connect()
        if rows := self._rows(node):
            _print_table(rows)
        else:
            click.echo(f"{node.url} lists nothing, and no worker is ready")

    def register_project(self, yes: bool) -> None:
        node, project = self._connect(), self._deployment.project
        expected = self._deployment.registrations(self._leases.workers())
        ready = [entry for entry in expected if entry.project == project]
        if not ready:
            raise click.ClickException(
                "no worker is ready: the list would be empty; see `node unregister-project`"
            )
        rows = self._rows(node)
        dropped = [row for row in rows if row.mark is Mark.FOREIGN and row.entry.project == project]
        if dropped and not yes:
            _print_table(dropped)
            click.confirm("These entries of others are dropped from the project. Go on?", abort=True)
        with self._lock.turn():
            node.register_project(project, ready)
        click.echo(f"{project}: {len(ready)} registered")

    def unregister_project(self, yes: bool) -> None:
        node, project = self._connect(), self._deployment.project
        if not yes:
            click.confirm(f"Remove project {project} with all its models from {node.url}?", abort=True)
        with self._lock.turn():
            node.unregister_project(project)
        click.echo(f"{project}: unregistered")

    def prune(self) -> None:
        node = self._connect()
        with self._lock.turn():
            stale = [row.entry for row in self._rows(node) if row.mark is Mark.STALE]
            for entry in stale:
                node.unregister_model(entry.project, entry.model, entry.cid)
                click.echo(f"{entry.project} {entry.model} {entry.cid}: unregistered")
        click.echo(f"{len(stale)} stale")

    def _connect(self) -> NodeClient:
        node_url = self._deployment.settings.node_url
        if not node_url:
            raise click.ClickException("NODE_URL is empty: there is no node to call")
        return NodeClient(node_url, timeout_s=TIMEOUT_S)

    def _rows(self, node: NodeClient) -> list[Row]:
        return compare(node.models(), self._leases.workers(), self._deployment)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turn errors of the node and of Redis into one line and exit status 1."""
    try:
        yield
    except NodeError as error:
        raise click.ClickException(str(error)) from error
    except RedisError as error:
        raise click.ClickException(
            f"Redis can't be reached, so the living workers are unknown: {error}"
        ) from error


def _print_table(rows: list[Row]) -> None:
    table: list[tuple[str, ...]] = [("MARK", "PROJECT", "MODEL", "CID", "TYPE", "WORKER", "API")]
    for mark, entry, state in rows:
        table.append((mark, entry.project, entry.model, entry.cid, str(entry.type), state or "-", entry.api))
    print_table(table)
    for mark in {row.mark: None for row in rows}:
        click.echo(f"{mark}: {MEANINGS[mark]}")
