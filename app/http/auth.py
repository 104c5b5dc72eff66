"""Access control: API keys, rate limits and the node's own listener.

That listener needs no key. It serves only the POST endpoints of the models, and /healthz, which workers ask
before they register its address.
"""

import hashlib
import hmac
import re
from contextlib import suppress
from typing import Protocol

from flask import Flask, request

from addresses import split_address
from catalogue import TASKS
from config import Settings
from protocol.errors import NotFound, Unauthorized

HEALTH_PATH = "/healthz"
OPEN_PATHS = frozenset({"/", "/docs", HEALTH_PATH, "/readyz", "/health", "/ping", "/version"})
KEY_HEADERS = ("x-api-key", "api-key")
"""Where a client may send its key instead of in Authorization: as Anthropic's, and as Azure's clients do."""
_HEADERS = "'Authorization: Bearer <key>', " + " or ".join(f"'{name}: <key>'" for name in KEY_HEADERS)
_BEARER = re.compile(r"(^|,)\s*bearer(?= |$)", re.IGNORECASE)
STATIC_PREFIX = "/static/"
"""The files of the console."""
OPEN_PREFIXES = ("/v1/images/files/", STATIC_PREFIX)
TASK_PATHS = frozenset(path for task in TASKS.values() for path in task.paths)
NODE_PATHS = frozenset(task.path for task in TASKS.values() if task.node_type is not None)


class Limiter(Protocol):
    """A rate limiter for each API key (app.http.rate_limit)."""

    def check(self, key_name: str) -> None:
        """Count a request that carries this key. Raises RateLimited."""


class Gate:
    """Allows or refuses each request by its listener, its API key and how often that key was used."""

    def __init__(self, settings: Settings, limiter: Limiter | None = None) -> None:
        self._known = [(form, _name(key)) for key in settings.api_keys for form in _forms(key)]
        self._limiter = limiter
        self._node_listener = _listener(settings) if settings.api_keys else None

    def init_app(self, app: Flask) -> None:
        """Check every request to `app` before its route."""
        app.before_request(self.check)

    def check(self) -> None:
        """Check the current request.

        Raises Unauthorized for a missing or wrong key and for several, NotFound for an endpoint that the
        node's listener does not serve, and RateLimited.
        """
        if self.through_node_listener():
            is_task = request.method == "POST" and request.path in NODE_PATHS
            is_probe = request.method == "GET" and request.path == HEALTH_PATH
            if not (is_task or is_probe):
                raise NotFound(
                    "this address is for the network node; it serves only POST requests of model endpoints"
                )
            return
        if request.path in OPEN_PATHS or request.path.startswith(OPEN_PREFIXES):
            return
        if not self._known:
            return
        sent = _sent_keys()
        if len(sent) > 1:
            raise Unauthorized(
                f"the request carries several API keys; send one, in one of the headers {_HEADERS}"
            )
        key_name = self._key_name()
        if key_name is None:
            raise Unauthorized(f"a valid API key is required: send it in one of the headers {_HEADERS}")
        # only requests that need a worker count against the limit
        if self._limiter is not None and request.method == "POST" and request.path in TASK_PATHS:
            self._limiter.check(key_name)

    def has_key(self) -> bool:
        """Whether the current request carries a valid key, or none is required."""
        return not self._known or self._key_name() is not None

    def caller(self) -> str | None:
        """Return the name of the current request's key, "" if none is required, None for the network node."""
        if self.through_node_listener():
            return None
        return (self._key_name() or "") if self._known else ""

    def carries_one_of(self, keys: tuple[str, ...]) -> bool:
        """Whether the current request carries one of these keys of API_KEYS."""
        return self._key_name() in [_name(key) for key in keys]

    def _key_name(self) -> str | None:
        """Return the name of the request's key, or None. Compares every key, in constant time."""
        sent = _sent_keys()
        # WSGI decodes header bytes as Latin-1
        digest = _digest(sent[0].encode("latin-1", "replace") if len(sent) == 1 else b"")
        matches = [name for known, name in self._known if hmac.compare_digest(digest, known)]
        return matches[0] if matches else None

    def through_node_listener(self) -> bool:
        """Whether the current request came through the listener of the network node (NODE_BIND)."""
        connection = request.environ.get("gunicorn.socket")
        if self._node_listener is None or connection is None:
            return False
        host, port = self._node_listener
        name = connection.getsockname()
        return name[1] == port and host in (None, name[0])


def _sent_keys() -> list[str]:
    """Return the keys that the current request carries: the lines of a repeated header each have one.

    The same key in two headers is one key.
    """
    authorization = request.headers.get("Authorization", "")
    values = [request.headers.get(name, "") for name in KEY_HEADERS]
    if scheme := _BEARER.search(authorization):
        values.append(authorization if scheme.start() else authorization[scheme.end() :])
    # gunicorn joins the lines of a repeated header with commas, which no key contains
    headers = {tuple(line.strip() for line in value.split(",")) for value in values if value.strip()}
    return [key for lines in headers for key in lines]


def _listener(settings: Settings) -> tuple[str | None, int]:
    """Return the address and port of the node's listener; address None if no other listener has that port.

    The port is then enough, and a host name or wildcard would never equal the address from `getsockname`.
    """
    host, port = split_address(settings.node_bind)
    alone = split_address(settings.bind)[1] != port
    return None if alone else host, port


def _forms(key: str) -> set[bytes]:
    """Return the digests of a key in the encodings that clients use: UTF-8, and Latin-1 where possible."""
    forms = {_digest(key.encode("utf-8", "surrogateescape"))}
    with suppress(UnicodeEncodeError):
        forms.add(_digest(key.encode("latin-1")))
    return forms


def _name(key: str) -> str:
    """Return the name of a key in Redis, from which the key can't be recovered."""
    return _digest(key.encode("utf-8", "surrogateescape")).hex()[:32]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
