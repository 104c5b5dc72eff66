"""Downloading the picture that a caller's URL names, without becoming his way into our network (SSRF).

A URL is taken apart once; every address its host resolves to is judged; the connection goes to a judged address, never
to a name; each redirect starts over. Bytes, time, redirects and parallel downloads are bounded. Whatever is refused or
fails gives one and the same text, so that nobody can map a network by our answers. Works with and without gevent: time is
kept by a timer that shuts the socket, which wakes any read or handshake that still waits.
"""

import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from app.images.public_address import is_own, is_public
from protocol.errors import InvalidImage, Overloaded
from protocol.image_files import MAX_BYTES

CONNECT_S = 3.0
TOTAL_S = 15.0
MAX_REDIRECTS = 3
MAX_URL = 8192
PARALLEL = 4
_NETLOC = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@%]+)(:[0-9]{1,5})?")
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "Accept": "image/png, image/jpeg, image/webp",
    "Accept-Encoding": "identity",
    "User-Agent": "modelservice",
    "Connection": "close",
}

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Sequence[str]]
"""All addresses of a host name or literal, as text. Raises OSError."""


def resolve(host: str, port: int) -> list[str]:
    """The system's resolver."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _Refused(Exception):
    """Why, for the log; the caller isn't told."""


class _Target(NamedTuple):
    """A URL, taken apart for good. `host` is ASCII, lower case, IPv6 without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


class ImageFetcher:
    """Downloads for one web process. Thread safe."""

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        public_url: str = "",
        read_own: Callable[[str], bytes | None] = lambda name: None,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`allowed_hosts`: "host" or "host:port" that the operator permits whatever its addresses and port are.
        `read_own` gives a stored picture by name: links below `public_url` are read there and never fetched."""
        self._allowed = frozenset(host.lower() for host in allowed_hosts)
        self._own_link = (
            re.compile(re.escape(public_url) + r"/v1/images/files/([A-Za-z0-9_-]+)") if public_url else None
        )
        self._read_own = read_own
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._slots = threading.BoundedSemaphore(PARALLEL)
        self._resolvers = ThreadPoolExecutor(PARALLEL, thread_name_prefix="resolve")

    def fetch(self, url: str, param: str = "image") -> bytes:
        """The bytes behind a URL, at most MAX_BYTES. Raises InvalidImage, and Overloaded when all slots stay busy."""
        if self._own_link and (own := self._own_link.fullmatch(url)):
            if (png := self._read_own(own[1])) is None:
                raise InvalidImage(
                    f"{param}: this picture link has expired; send the picture itself", param=param
                )
            return png
        if not self._slots.acquire(timeout=TOTAL_S):
            raise Overloaded("too many pictures are being fetched; try again soon", retry_after_s=5)
        try:
            return self._follow(url, time.monotonic() + TOTAL_S)
        except (_Refused, OSError, HTTPException, ValueError) as error:
            reason = str(error) if isinstance(error, _Refused) else type(error).__name__
            log.info("a picture URL was not fetched: %s", reason)
            raise InvalidImage(
                f"{param} could not be fetched; it must be a public http(s) URL on port 80 or 443 that gives a PNG, JPEG"
                " or WEBP picture of at most 10 MiB within 15 s",
                param=param,
            ) from None
        finally:
            self._slots.release()

    def _follow(self, url: str, deadline: float) -> bytes:
        target = _parse(url)
        for _ in range(MAX_REDIRECTS + 1):
            addresses = self._judge(target, deadline)
            with self._get(target, addresses, deadline) as response:
                if response.status not in _REDIRECTS:
                    return _body(response, deadline)
                location = response.headers.get("Location", "")
            here = f"{target.scheme}://{target.authority}{target.path}"
            before, target = target, _parse(urljoin(here, location) if _is_plain(location) else "")
            if (before.scheme, target.scheme) == ("https", "http"):
                raise _Refused("redirect from https to http")
        raise _Refused("too many redirects")

    def _judge(self, target: _Target, deadline: float) -> list[str]:
        """The target's addresses, if it may be visited: one bad address condemns all."""
        host = f"[{target.host}]" if ":" in target.host else target.host
        allowed = host in self._allowed or f"{host}:{target.port}" in self._allowed
        if not allowed and target.port not in (80, 443):
            raise _Refused("port")
        # in a thread, because a resolver takes no timeout; under gevent this is a greenlet
        answer = self._resolvers.submit(self._resolve, target.host, target.port)
        addresses = list(dict.fromkeys(answer.result(timeout=_left(deadline))))
        if not addresses or (
            not allowed and not all(is_public(one) and not is_own(one) for one in addresses)
        ):
            raise _Refused("address")
        return addresses

    @contextmanager
    def _get(self, target: _Target, addresses: Sequence[str], deadline: float) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(target.host, target.port)
        plain = self._connect(addresses, target.port, deadline)
        handle = plain.dup()  # TLS takes the socket over; this one still reaches the connection
        alarm = threading.Timer(_left(deadline), _shut, [handle])
        alarm.daemon = True
        alarm.start()
        try:
            connection.sock = plain
            if target.scheme == "https":
                connection.sock = self._tls.wrap_socket(plain, server_hostname=target.host)
            connection.sock.settimeout(_left(deadline))
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            for name, value in {"Host": target.authority, **_HEADERS}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with connection.getresponse() as response:
                yield response
        finally:
            alarm.cancel()
            handle.close()
            connection.close()
            plain.close()

    def _connect(self, addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
        """To the first judged address that answers."""
        until = min(deadline, time.monotonic() + CONNECT_S)
        for address in addresses:
            with suppress(OSError):
                return socket.create_connection((address, port), timeout=_left(until))
        raise _Refused("no connection")


def _parse(url: str) -> _Target:
    """Take a URL apart. Raises _Refused and ValueError for all that parsers read differently."""
    if not _is_plain(url):
        raise _Refused("form")
    parts = urlsplit(url)
    authority = _NETLOC.fullmatch(parts.netloc)
    if parts.scheme not in ("http", "https") or authority is None:
        raise _Refused("form")
    literal = authority[1].startswith("[")
    host = authority[1][1:-1] if literal else authority[1].encode("idna").decode("ascii")
    port = int(authority[2][1:]) if authority[2] else {"http": 80, "https": 443}[parts.scheme]
    query = "?" + quote(parts.query, safe="%/:?@!$&'()*+,;=~-._[]") if parts.query else ""
    return _Target(
        parts.scheme, host.lower(), port, (quote(parts.path, safe="%/:@!$&'()*+,;=~-._") or "/") + query
    )


def _is_plain(url: str) -> bool:
    """Free of what makes parsers disagree: white space, control characters, backslashes, fragments."""
    return 0 < len(url) <= MAX_URL and not any(c <= " " or c in "\\#\x7f" or c.isspace() for c in url)


def _body(response: HTTPResponse, deadline: float) -> bytes:
    if response.status != 200 or response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused(f"answer {response.status}")
    if (response.length or 0) > MAX_BYTES:
        raise _Refused("size")
    body = bytearray()
    while part := response.read1(65536):
        body += part
        if len(body) > MAX_BYTES:
            raise _Refused("size")
        _left(deadline)
    _left(deadline)  # the alarm's shut socket looks like an end
    if response.length:
        raise _Refused("cut short")
    return bytes(body)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _Refused("time")
    return left


def _shut(handle: socket.socket) -> None:
    with suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)
