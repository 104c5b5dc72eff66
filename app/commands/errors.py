"""How commands of `flask --app wsgi` fail: with one line, and the exit status of every process of the
service."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
from redis.exceptions import RedisError

from config import EXIT_TEMPORARY


class CommandFailed(click.ClickException):
    """Raised to end a command with one line and `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]  # click's stubs make it one for the class


@contextmanager
def redis_needed() -> Iterator[None]:
    """Raise CommandFailed, status EXIT_TEMPORARY, for an error of Redis."""
    try:
        yield
    except RedisError as error:
        reason = " ".join(str(error).split())
        raise CommandFailed(f"REDIS_URL: Redis can't be reached: {reason}", EXIT_TEMPORARY) from error
