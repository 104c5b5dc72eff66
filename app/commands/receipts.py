"""`flask --app wsgi receipts verify FILE`: checks the signatures of receipts."""

from pathlib import Path
from typing import BinaryIO

import click
from flask.cli import AppGroup

from app.commands.errors import CommandFailed
from config import EXIT_CONFIGURATION


def receipt_commands(folder: Path | None) -> AppGroup:
    """Make the command group `receipts`. `folder`: RECEIPTS."""
    group = AppGroup("receipts", help="Check receipts of requests.", short_help="Receipts of requests.")

    @group.command("verify")
    @click.argument("file", type=click.File("rb"))
    @click.option(
        "--key",
        type=click.Path(path_type=Path),
        help="The public key. Default: key.pub in the folder RECEIPTS.",
    )
    def verify(file: BinaryIO, key: Path | None) -> None:
        """Check each line of FILE (- for standard input) and name those that are no valid receipt."""
        # imported here: the service itself starts without the library
        from protocol.receipts import PUBLIC_KEY_FILE, KeyUnusable, find_fault, load_public_key

        path = key or (folder / PUBLIC_KEY_FILE if folder else None)
        if path is None:
            raise CommandFailed("name the public key with --key, or set RECEIPTS", EXIT_CONFIGURATION)
        try:
            public_key = load_public_key(path)
        except KeyUnusable as error:
            raise CommandFailed(str(error), EXIT_CONFIGURATION) from error
        lines = bad = 0
        for line in file:
            lines += 1
            if fault := find_fault(line.removesuffix(b"\n"), public_key):
                bad += 1
                click.echo(f"{file.name}:{lines}: {fault}")
        click.echo(f"{lines - bad} of {lines} lines are valid receipts")
        if bad:
            raise click.exceptions.Exit(1)

    return group
