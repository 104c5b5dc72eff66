"""Who may call what: bearer keys, and the node's own listener, which needs none but offers the standard's POST routes alone."""

import hashlib
import hmac
from contextlib import suppress
from typing import Protocol

from flask import Flask, request

from config import Settings
from protocol.errors import NotFound, Unauthorized

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
OPEN_PREFIXES = ("/v1/images/files/", "/static/")
NODE_PATHS = frozenset({"/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"})


class Limiter(Protocol):
    """What counts how often a key asks (app.http.rate_limit)."""

    def check(self, caller: str) -> None:
        """Count a request of `caller`. Raises RateLimited."""


class Gate:
    """Judges each request by the listener it came through, the key it carries and how often that key was used."""

    def __init__(self, settings: Settings, limiter: Limiter | None = None) -> None:
        self._known = [(form, _name(key)) for key in settings.api_keys for form in _forms(key)]
        self._limiter = limiter
        self._node_listener = _listener(settings) if settings.api_keys else None

    def init_app(self, app: Flask) -> None:
        """Stand before every route of `app`."""
        app.before_request(self.check)

    def check(self) -> None:
        """Raises Unauthorized for a missing or wrong key, NotFound for what the node's listener doesn't offer, RateLimited."""
        if self.through_node_listener():
            if request.method != "POST" or request.path not in NODE_PATHS:
                raise NotFound(
                    "this listener is the network node's: it takes POSTs of the standard's routes alone"
                )
            return
        if request.path in OPEN_PATHS or request.path.startswith(OPEN_PREFIXES):
            return
        if not self._known:
            return
        caller = self._caller()
        if caller is None:
            raise Unauthorized("a valid API key is needed: send the header 'Authorization: Bearer <key>'")
        # what occupies a GPU is counted; looking at models or figures is not
        if self._limiter is not None and request.method == "POST" and request.path in NODE_PATHS:
            self._limiter.check(caller)

    def has_key(self) -> bool:
        """The request carries a valid key, or none is needed."""
        return not self._known or self._caller() is not None

    def _caller(self) -> str | None:
        """Name of the key that the request carries, None without a valid one. Every key is compared, in constant time."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # WSGI hands header bytes over as Latin-1
        digest = _digest(given.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b"")
        matches = [name for known, name in self._known if hmac.compare_digest(digest, known)]
        return matches[0] if matches else None

    def through_node_listener(self) -> bool:
        connection = request.environ.get("gunicorn.socket")
        if self._node_listener is None or connection is None:
            return False
        host, port = self._node_listener
        name = connection.getsockname()
        # a Unix socket's name is a string: that is never the node's
        return isinstance(name, tuple) and name[1] == port and host in (None, name[0])


def _listener(settings: Settings) -> tuple[str | None, int] | None:
    """Address and port by which the node's listener is known; the port alone where no other listener has it.

    A name ("localhost") or wildcard never equals the address that a connection tells.
    """
    host, _, port = settings.node_bind.rpartition(":")
    if not port.isdigit():
        return None
    alone = settings.bind.rpartition(":")[2] != port
    return None if alone else host.strip("[]"), int(port)


def _forms(key: str) -> set[bytes]:
    """Digests of a key as clients send it: UTF-8, and Latin-1 from those that take HTTP by its letter."""
    forms = {_digest(key.encode("utf-8", "surrogateescape"))}
    with suppress(UnicodeEncodeError):
        forms.add(_digest(key.encode("latin-1")))
    return forms


def _name(key: str) -> str:
    """What a key is called in Redis: nobody can tell the key from it."""
    return _digest(key.encode("utf-8", "surrogateescape")).hex()[:32]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
