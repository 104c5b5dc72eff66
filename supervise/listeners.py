"""Checks that the addresses the service listens on are free."""

import errno
import socket
from collections.abc import Iterator

from config import ConfigurationError, Settings

FLOWER_ADDRESS = "127.0.0.1:5555"


class Unavailable(Exception):
    """Raised where something other than the configuration prevents the start, such as a port in use.

    The message is one line.
    """


def split_address(name: str, address: str) -> tuple[str, int]:
    """Split `127.0.0.1:1088` or `[::1]:1088` into host and port.

    Raises ConfigurationError, which names the setting.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{name}: {address!r} is not host:port")
    return host, int(port)


def check_free(settings: Settings) -> None:
    """Check every address.

    Raises Unavailable for a port in use, ConfigurationError for an address of another machine.
    """
    for name, address in _listeners(settings):
        host, port = split_address(name, address)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # gunicorn sets this too: connections of an earlier run in TIME_WAIT don't matter.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise Unavailable(f"{name}: {address} is in use by another program") from error
                raise ConfigurationError(f"{name}: {address}: {error.strerror or error}") from error


def _listeners(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "BIND", settings.bind
    if settings.api_keys:
        yield "NODE_BIND", settings.node_bind
    if settings.flower_basic_auth:
        yield "Flower", FLOWER_ADDRESS
