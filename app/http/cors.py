"""CORS: which web pages of other origins a browser lets call this service and read its responses.

Keys travel in headers and not in cookies, so responses never allow credentials.
"""

from collections.abc import Callable, Sequence

from flask import Flask, Response, request

ANY = "*"
ALLOW_METHODS = "GET, HEAD, POST"
ALLOW_HEADERS = "Authorization, Content-Type, X-Api-Key, Api-Key, X-Request-Id, *"
"""`*` stands for what else clients send, OpenAI's their X-Stainless headers. It never covers
Authorization."""
EXPOSE_HEADERS = (
    "X-Request-Id, X-Ignored-Params, X-Should-Retry, Retry-After, X-Queued-Ms, X-First-Token-Ms, X-Total-Ms"
)
MAX_AGE_S = 3600
"""How long a browser may keep the answer to a preflight request."""


class Cors:
    """Answers preflight requests, and adds CORS headers to the responses for listed origins.

    The listener of the network node needs no key, so nothing is allowed there.
    """

    def __init__(self, origins: Sequence[str], through_node_listener: Callable[[], bool]) -> None:
        """`origins`: CORS_ORIGINS; without any nothing is done."""
        self._origins = origins
        self._through_node_listener = through_node_listener

    def init_app(self, app: Flask) -> None:
        """Call this before the gate's `init_app`: a browser sends no key with a preflight request."""
        if self._origins:
            app.before_request(self._answer_preflight)
            app.after_request(self._add_headers)

    def _answer_preflight(self) -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if self._allowed() is None:
            return None
        response = Response(status=204)
        del response.headers["Content-Type"]
        response.headers["Access-Control-Allow-Methods"] = ALLOW_METHODS
        response.headers["Access-Control-Allow-Headers"] = ALLOW_HEADERS
        response.headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
        return response

    def _add_headers(self, response: Response) -> Response:
        # also where the origin is not allowed, or none was sent: a cache must not give that response to
        # others
        response.vary.add("Origin")
        if allowed := self._allowed():
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = EXPOSE_HEADERS
        return response

    def _allowed(self) -> str | None:
        """Return the value of Access-Control-Allow-Origin, None if the current request gets none."""
        origin = request.headers.get("Origin")
        if origin is None or not is_listed(origin, self._origins) or self._through_node_listener():
            return None
        return ANY if ANY in self._origins else origin


def is_listed(origin: str, origins: Sequence[str]) -> bool:
    """Whether CORS_ORIGINS names this origin."""
    return ANY in origins or origin in origins
