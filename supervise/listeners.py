"""Checks that the addresses the service listens on are free."""

import errno
from collections.abc import Iterator

import addresses
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
            addresses.check_free(address)
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
