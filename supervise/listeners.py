"""Checks that the addresses the service listens on are free."""

import errno
import socket
from collections.abc import Iterator

from addresses import split_address
from config import ConfigurationError, Settings

FLOWER_ADDRESS = "127.0.0.1:5555"


class Unavailable(Exception):
    """Raised where something other than the configuration prevents the start, such as a port in use.

    The message is one line.
    """


def check_free(settings: Settings) -> None:
    """Check every address.

    Raises Unavailable for a port in use, ConfigurationError for an address of another machine.
    """
    for name, address in _listeners(settings):
        try:
            _bind(*split_address(address))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Unavailable(f"{name}: {address} is in use by another program") from error
            raise ConfigurationError(f"{name}: {address}: {error.strerror or error}") from error


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # gunicorn sets this too: connections of an earlier run in TIME_WAIT don't matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _listeners(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "BIND", settings.bind
    if settings.api_keys:
        yield "NODE_BIND", settings.node_bind
    if settings.flower_basic_auth:
        yield "Flower", FLOWER_ADDRESS
