"""`flask --app wsgi workers ...`: shows the workers, takes some out of service, and lets them serve again."""

import time
from collections.abc import Sequence

import click
from flask.cli import AppGroup

from app.commands.errors import CommandFailed, redis_needed
from node.registration import has_node_type
from node.table import print_table
from protocol.drains import Drains
from protocol.leases import Leases, WorkerRecord

POLL_S = 0.5
HEAD = ("NAME", "MODEL", "STATE", "RUNNING", "REGISTERED", "DRAIN", "HOST", "PID", "CID")


def worker_commands(leases: Leases, drains: Drains) -> AppGroup:
    """Make the command group `workers`. Nothing connects before a command runs."""
    group = AppGroup(
        "workers", help="Show workers, take them out of service and back.", short_help="The workers."
    )
    admin = WorkerAdmin(leases, drains)
    names = click.argument("names", metavar="[NAME]...", nargs=-1)
    every = click.option("--all", "every", is_flag=True, help="All workers.")

    @group.command("list")
    def list_workers() -> None:
        """Show all workers, and which are under drain."""
        with redis_needed():
            admin.list_workers()

    @group.command("drain")
    @names
    @every
    @click.option("--wait", is_flag=True, help="Return when they have finished what they run.")
    def drain(names: tuple[str, ...], every: bool, wait: bool) -> None:
        """Let workers finish what they run, and take nothing new until they are resumed.

        NAME is as `list` shows it; the part before the @ is enough where it names one worker.
        """
        with redis_needed():
            drained = admin.drain(names, every)
            if wait:
                admin.wait_idle(drained)

    @group.command("resume")
    @names
    @every
    def resume(names: tuple[str, ...], every: bool) -> None:
        """Let drained workers serve again."""
        with redis_needed():
            admin.resume(names, every)

    return group


class WorkerAdmin:
    """What the commands do. Methods raise redis.RedisError and CommandFailed."""

    def __init__(self, leases: Leases, drains: Drains) -> None:
        self._leases = leases
        self._drains = drains

    def list_workers(self) -> None:
        records, drained = self._leases.workers(), self._drains.names()
        if not records and not drained:
            click.echo("no worker runs")
            return
        running = {record.name for record in records}
        stopped = [(name, "-", "stopped", "-", "-", "yes", "-", "-", "-") for name in drained]
        rows = [_row(record, drained) for record in records]
        print_table([HEAD, *rows, *(row for row in stopped if row[0] not in running)])

    def drain(self, wanted: Sequence[str], every: bool) -> list[str]:
        """Put workers under drain; returns their names."""
        records = self._leases.workers()
        names = _choose(wanted, every, [record.name for record in records])
        if not names:
            click.echo("no worker runs")
            return []
        self._drains.add(names)
        for name in names:
            click.echo(f"{name}: under drain until `workers resume {name}`")
        return names

    def resume(self, wanted: Sequence[str], every: bool) -> None:
        """Let workers under drain serve again. A worker that is not under drain stays as it is."""
        drained = self._drains.names()
        known = drained if every else [*drained, *(record.name for record in self._leases.workers())]
        names = _choose(wanted, every, known)
        if not names:
            click.echo("no worker is under drain")
            return
        self._drains.remove(names)
        for name in names:
            click.echo(f"{name}: resumed" if name in drained else f"{name}: was not under drain")

    def wait_idle(self, names: Sequence[str]) -> None:
        """Return when each of these workers has finished what it ran, or has ended, or was resumed."""
        waiting = list(names)
        while waiting:
            states = {record.name: record.state for record in self._leases.workers()}
            under_drain = self._drains.names()
            for name in list(waiting):
                state = states.get(name, "stopped")
                if state in ("drained", "lost", "stopped") or name not in under_drain:
                    click.echo(f"{name}: {state}")
                    waiting.remove(name)
            if waiting:
                time.sleep(POLL_S)


def _row(record: WorkerRecord, drained: Sequence[str]) -> tuple[str, ...]:
    return (
        record.name or "-",
        record.model,
        record.state,
        str(record.running),
        _registered(record),
        "yes" if record.name in drained else "no",
        record.host,
        str(record.pid),
        record.cid,
    )


def _choose(wanted: Sequence[str], every: bool, known: Sequence[str]) -> list[str]:
    """Return the full names that an operator means, each once. Raises CommandFailed."""
    names = sorted({name for name in known if name})
    if every == bool(wanted):
        raise CommandFailed("give names of workers, or --all", 2)
    return names if every else sorted({_find(name, names) for name in wanted})


def _find(wanted: str, names: Sequence[str]) -> str:
    found = [name for name in names if wanted in (name, name.partition("@")[0])]
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandFailed(f"{wanted!r} names several workers: {', '.join(found)}")
    raise CommandFailed(f"there is no worker {wanted!r}; there are: {', '.join(names) or 'none'}")


def _registered(record: WorkerRecord) -> str:
    """A dash for a task that the node does not know."""
    return "-" if not has_node_type(record.tasks) else "yes" if record.registered else "no"
