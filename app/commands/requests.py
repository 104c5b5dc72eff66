"""`flask --app wsgi requests ...`: shows the open requests without their prompts, and cancels one."""

from collections.abc import Sequence

import click
from flask.cli import AppGroup

from app.commands.errors import CommandFailed, redis_needed
from node.table import print_table
from protocol.leases import Leases
from protocol.open_requests import OpenRequest, OpenRequests

HEAD = ("ID", "MODEL", "STATE", "WORKER", "AGE")


def request_commands(models: Sequence[str], requests: OpenRequests, leases: Leases) -> AppGroup:
    """Make the command group `requests`. Nothing connects before a command runs."""
    group = AppGroup("requests", help="Show and cancel open requests.", short_help="The open requests.")

    @group.command("list")
    def list_requests() -> None:
        """Show which requests wait and run, since when, and where. Prompts are never shown."""
        with redis_needed():
            found = requests.of_models(models)
            names = {record.incarnation_id: record.name or record.cid for record in leases.workers()}
        if found:
            print_table([HEAD, *(_row(request, names) for request in found)])
        else:
            click.echo("no request is open")

    @group.command("cancel")
    @click.argument("request_id", metavar="ID")
    def cancel(request_id: str) -> None:
        """Cancel the request ID, as `list` shows it. Its client gets an error."""
        with redis_needed():
            if not requests.cancel(request_id, models):
                raise CommandFailed(f"there is no open request {request_id!r}; `requests list` shows them")
        click.echo(f"{request_id}: cancelled")

    return group


def _row(request: OpenRequest, names: dict[str, str]) -> tuple[str, ...]:
    running = bool(request.incarnation_id)
    return (
        request.id,
        request.model,
        "running" if running else "waiting",
        names.get(request.incarnation_id, "lost") if running else "-",
        f"{request.age_s:.1f} s",
    )
