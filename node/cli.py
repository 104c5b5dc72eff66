"""`flask --app wsgi node …`: what the node believes beside what is true, and the calls that no process makes by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import click
from flask.cli import AppGroup
from redis.exceptions import RedisError

from config import Settings
from node.client import (
    NodeClient,
    NodeError,
    Registration,
    is_of_node,
    is_ours,
    registrations_of,
)
from node.lock import NodeLock
from protocol.leases import Leases, WorkerRecord

Mark = Literal["ok", "missing", "changing", "stale", "foreign"]

MARKS: dict[Mark, str] = {
    "ok": "a ready worker stands for it",
    "missing": "a ready worker that the node doesn't list yet",
    "changing": "its worker lives and will correct the entry",
    "stale": "ours, but no living worker stands for it: `node prune` takes it off",
    "foreign": "somebody else's",
}


class Row(NamedTuple):
    """One entry and what is known of its worker. `state`: the worker's, "" when none is known."""

    mark: Mark
    entry: Registration
    state: str


def compare(
    entries: list[Registration], records: list[WorkerRecord], settings: Settings, namespace: str
) -> list[Row]:
    """The node's entries in its order, then what it lacks."""
    expected = registrations_of(records, settings)
    states = {record.cid: record.state for record in records if is_of_node(record, settings)}
    rows = []
    for entry in entries:
        state = states.get(entry.cid, "")
        if entry in expected:
            mark: Mark = "ok"
        elif state not in ("", "lost"):
            mark = "changing"
        elif state or is_ours(entry.cid, settings.service_id, namespace):
            mark = "stale"
        else:
            mark = "foreign"
        rows.append(Row(mark, entry, state))
    listed = {(entry.project, entry.model, entry.cid) for entry in entries}
    lacking = [entry for entry in expected if (entry.project, entry.model, entry.cid) not in listed]
    return rows + [Row("missing", entry, states[entry.cid]) for entry in lacking]


def node_commands(
    settings: Settings, *, project: str, namespace: str, leases: Leases, lock: NodeLock
) -> AppGroup:
    """Make the group `node`. Nothing connects before a command runs."""
    group = AppGroup(
        "node", help="What the network node believes, and how to correct it.", short_help="The network node."
    )

    @contextmanager
    def open_node() -> Iterator[_Node]:
        if not settings.node_url:
            raise click.ClickException("NODE_URL is empty: there is no node to talk to")
        with _one_line_errors():
            yield _Node(settings, project, namespace, leases, lock)

    @group.command("list")
    def list_entries() -> None:
        """Show what the node lists beside the workers that live."""
        with open_node() as node:
            _list(node)

    @group.command("register-project")
    @click.option("--yes", is_flag=True, help="Drop others' entries of the project without asking.")
    def register_project(yes: bool) -> None:
        """Replace the project's whole list by the workers that are ready now."""
        with open_node() as node:
            _register_project(node, yes)

    @group.command("unregister-project")
    @click.option("--yes", is_flag=True, help="Don't ask.")
    def unregister_project(yes: bool) -> None:
        """Remove the project with everybody's models. Workers that live register again within a minute."""
        with open_node() as node:
            _unregister_project(node, yes)

    @group.command("prune")
    def prune() -> None:
        """Take our stale entries off the node; the reconciler does the same by itself, more cautiously."""
        with open_node() as node:
            _prune(node)

    return group


class _Node:
    """One command's view of the node and of the workers."""

    def __init__(
        self, settings: Settings, project: str, namespace: str, leases: Leases, lock: NodeLock
    ) -> None:
        self.project = project
        self.client = NodeClient(settings.node_url, timeout_s=15.0)
        self.lock = lock
        self._settings = settings
        self._namespace = namespace
        self._leases = leases

    def expected(self) -> list[Registration]:
        return registrations_of(self._leases.workers(), self._settings)

    def rows(self) -> list[Row]:
        return compare(self.client.models(), self._leases.workers(), self._settings, self._namespace)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Report the errors of the node and of Redis as one line, with exit status 1."""
    try:
        yield
    except NodeError as error:
        raise click.ClickException(str(error)) from error
    except RedisError as error:
        raise click.ClickException(
            f"Redis can't be reached, so nobody knows which workers live: {error}"
        ) from error


def _list(node: _Node) -> None:
    rows = node.rows()
    if rows:
        _print_table(rows)
    else:
        click.echo(f"{node.client.url} lists nothing, and no worker is ready")


def _register_project(node: _Node, yes: bool) -> None:
    ready = [entry for entry in node.expected() if entry.project == node.project]
    if not ready:
        raise click.ClickException(
            "no worker is ready: the list would be empty; see `node unregister-project`"
        )
    dropped = [row for row in node.rows() if row.mark == "foreign" and row.entry.project == node.project]
    if dropped and not yes:
        _print_table(dropped)
        click.confirm("These entries of others are dropped from the project. Go on?", abort=True)
    with node.lock.turn():
        node.client.register_project(node.project, ready)
    click.echo(f"{node.project}: {len(ready)} registered")


def _unregister_project(node: _Node, yes: bool) -> None:
    if not yes:
        click.confirm(
            f"Remove project {node.project} with all its models from {node.client.url}?", abort=True
        )
    with node.lock.turn():
        node.client.unregister_project(node.project)
    click.echo(f"{node.project}: unregistered")


def _prune(node: _Node) -> None:
    with node.lock.turn():
        stale = [row.entry for row in node.rows() if row.mark == "stale"]
        for entry in stale:
            node.client.unregister_model(entry.project, entry.model, entry.cid)
            click.echo(f"{entry.project} {entry.model} {entry.cid}: unregistered")
    click.echo(f"{len(stale)} stale")


def _print_table(rows: list[Row]) -> None:
    table: list[tuple[str, ...]] = [("MARK", "PROJECT", "MODEL", "CID", "TYPE", "WORKER", "API")]
    for mark, entry, state in rows:
        cells = (mark, entry.project, entry.model, entry.cid, str(entry.type), state or "-", entry.api)
        # others choose their names: no control characters of theirs on the terminal
        table.append(tuple(cell if cell.isprintable() else ascii(cell) for cell in cells))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for mark in {row.mark: None for row in rows}:
        click.echo(f"{mark}: {MARKS[mark]}")
