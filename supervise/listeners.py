"""The addresses that the service listens on, and whether they are free."""

import errno
import socket
from collections.abc import Iterator

from config import ConfigurationError, Settings

FLOWER_ADDRESS = "127.0.0.1:5555"


class Unavailable(Exception):
    """Something outside the configuration is in the way; another time it may not be. The message is one line."""


def split_address(name: str, address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:1088` or `[::1]:1088`. Raises ConfigurationError that says which setting `name` it is."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{name}: {address!r} is not host:port")
    return host, int(port)


def check_free(settings: Settings) -> None:
    """Raises Unavailable for a taken port, ConfigurationError for an address that can't be listened on."""
    for name, address in _listeners(settings):
        host, port = split_address(name, address)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # as gunicorn does: connections of an earlier run that still linger are in nobody's way
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise Unavailable(f"{name}: {address} is taken by another program") from error
                raise ConfigurationError(f"{name}: {address}: {error.strerror or error}") from error


def _listeners(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "BIND", settings.bind
    if settings.api_keys:
        yield "NODE_BIND", settings.node_bind
    if settings.flower_basic_auth:
        yield "Flower", FLOWER_ADDRESS
