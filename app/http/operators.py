"""Who may see what all clients do, and take workers out of service.

With API keys that is who has one of OPERATOR_KEYS, by default any. Without keys everybody may look, but only
somebody at this machine may act: the endpoints that act change what every client gets, and a page of another
site must not make its visitor's browser do it.
"""

from collections.abc import Callable

from flask import request

from app.http.origin import OriginCheck, is_loopback
from config import Settings
from protocol.errors import Forbidden

_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-Ip")
"""A proxy on this machine adds one of these; its clients may be anywhere."""


class Operators:
    """Refuses the requests of others. The gate has checked before that a key is valid where one is needed."""

    def __init__(
        self, settings: Settings, origins: OriginCheck, carries_one_of: Callable[[tuple[str, ...]], bool]
    ) -> None:
        """`carries_one_of`: whether the current request carries one of these keys."""
        self._keys = settings.operator_keys or settings.api_keys
        self._origins = origins
        self._carries_one_of = carries_one_of

    def check_may_look(self) -> None:
        """Raises Forbidden."""
        if self._keys and not self._carries_one_of(self._keys):
            raise Forbidden("this is for operators: send one of OPERATOR_KEYS")

    def check_may_act(self) -> None:
        """Raises Forbidden."""
        self.check_may_look()
        if self._keys:
            return  # no other site's page has a key
        if not is_loopback(request.remote_addr or "") or any(name in request.headers for name in _FORWARDED):
            raise Forbidden(
                "without API_KEYS this is allowed from the machine itself only; set API_KEYS, "
                "or use `flask --app wsgi workers`"
            )
        self._check_origin()

    def may_act(self) -> bool:
        """Whether `check_may_act` passes."""
        try:
            self.check_may_act()
        except Forbidden:
            return False
        return True

    def _check_origin(self) -> None:
        """CORS_ORIGINS doesn't count: it names sites that may use the models."""
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        own_host = host is None or self._origins.is_own(f"//{host}")
        if not own_host or (origin is not None and origin.partition("://")[2] != host):
            raise Forbidden("pages of other sites may not do this")
