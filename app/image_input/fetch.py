"""Downloads of the images that requests name by URL, without giving clients access to the internal network
(SSRF).

A URL is parsed once. Every address that its host resolves to is checked, and the connection goes to a checked
address, never to a name; each redirect starts over. Bytes, time, redirects and parallel downloads are
bounded. Every refusal and every failure has the same message, so that responses do not reveal the network. It
works with and without gevent: the time limit is a timer that shuts the socket down, which wakes any read or
handshake that still waits.
"""

import logging
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from app.image_input.public_address import is_public, is_this_machine
from protocol.errors import InvalidImage, Overloaded
from protocol.image_files import MAX_BYTES

CONNECT_S = 3.0
TOTAL_S = 15.0
MAX_REDIRECTS = 3
MAX_URL = 8192
PARALLEL = 16
PARALLEL_PER_HOST = 4
"""One slow host must not keep the images of all others waiting."""
SLOT_S = 5.0
"""How long a download waits for a free slot."""
SLOW_AFTER_S = 3.0
LEAST_BYTES_PER_S = 32 * 1024
"""A body that has arrived more slowly than this SLOW_AFTER_S after its beginning is refused, so that its slot
is free."""
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
"""Returns all addresses of a host name or literal, as text. Raises OSError."""


def resolve(host: str, port: int) -> list[str]:
    """Resolve with the system's resolver."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _Refused(Exception):
    """The reason for the log; the client is not told."""


class _Target(NamedTuple):
    """A parsed URL. `host` is ASCII in lower case, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


class ImageFetcher:
    """Downloads for one web process. Thread-safe."""

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        public_url: str = "",
        read_own: Callable[[str], bytes | None] = lambda name: None,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`allowed_hosts`: each "host" or "host:port"; the operator allows it with any address, and with any
        port or that one. `read_own` returns an image of the store by name: links to it, below `public_url`,
        are never fetched.
        """
        self._allowed = frozenset(host.lower() for host in allowed_hosts)
        self._own_link = (
            re.compile(re.escape(public_url) + r"/v1/images/files/([A-Za-z0-9_-]+)") if public_url else None
        )
        self._read_own = read_own
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._slots = threading.Condition()
        self._running: Counter[str] = Counter()
        self._resolvers = ThreadPoolExecutor(PARALLEL, thread_name_prefix="resolve")

    def fetch(self, url: str, param: str = "image") -> bytes:
        """Download a URL, at most MAX_BYTES. `param` is the field that has it.

        Raises InvalidImage, and Overloaded when too many downloads are running for too long.
        """
        if self._own_link and (own := self._own_link.fullmatch(url)):
            if (png := self._read_own(own[1])) is None:
                raise InvalidImage(
                    f"{param}: this image link has expired; send the image itself", param=param
                )
            return png
        try:
            target = _parse(url)
            with self._slot(target.host):
                return self._follow(target, time.monotonic() + TOTAL_S)
        except (_Refused, OSError, HTTPException, ValueError) as error:
            reason = str(error) if isinstance(error, _Refused) else type(error).__name__
            log.info("an image URL was not downloaded: %s", reason)
            raise InvalidImage(
                f"{param} could not be downloaded; it must be a public http(s) URL on port 80 or 443"
                " that returns a PNG, JPEG or WEBP image of at most 10 MiB within 15 s",
                param=param,
            ) from None

    @contextmanager
    def _slot(self, host: str) -> Iterator[None]:
        """Hold one of the slots for downloads, of which each host has a few. Raises Overloaded."""

        def free() -> bool:
            return self._running.total() < PARALLEL and self._running[host] < PARALLEL_PER_HOST

        with self._slots:
            if not self._slots.wait_for(free, SLOT_S):
                raise Overloaded("too many images are being downloaded; try again soon", retry_after_s=5)
            self._running[host] += 1
        try:
            yield
        finally:
            with self._slots:
                self._running[host] -= 1
                if not self._running[host]:
                    del self._running[host]
                self._slots.notify_all()

    def _follow(self, target: _Target, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            addresses = self._allowed_addresses(target, deadline)
            with self._get(target, addresses, deadline) as response:
                if response.status not in _REDIRECTS:
                    return _body(response, deadline)
                location = response.headers.get("Location", "")
            here = f"{target.scheme}://{target.authority}{target.path}"
            before, target = target, _parse(urljoin(here, location) if _is_plain(location) else "")
            if (before.scheme, target.scheme) == ("https", "http"):
                raise _Refused("redirect from https to http")
        raise _Refused("too many redirects")

    def _allowed_addresses(self, target: _Target, deadline: float) -> list[str]:
        """Resolve a target. Raises _Refused if its port or any one of its addresses is not allowed."""
        host = f"[{target.host}]" if ":" in target.host else target.host
        allowed = host in self._allowed or f"{host}:{target.port}" in self._allowed
        if not allowed and target.port not in (80, 443):
            raise _Refused("port")
        # in a thread, because resolvers have no timeout; under gevent it is a greenlet
        resolved = self._resolvers.submit(self._resolve, target.host, target.port)
        addresses = list(dict.fromkeys(resolved.result(timeout=_remaining_s(deadline))))
        if not addresses or (
            not allowed and not all(is_public(one) and not is_this_machine(one) for one in addresses)
        ):
            raise _Refused("address")
        return addresses

    @contextmanager
    def _get(self, target: _Target, addresses: Sequence[str], deadline: float) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(target.host, target.port)
        plain = self._connect(addresses, target.port, deadline)
        # wrapping in TLS detaches the first socket object; the duplicate still reaches the connection
        handle = plain.dup()
        timer = threading.Timer(_remaining_s(deadline), _shut, [handle])
        timer.daemon = True
        timer.start()
        try:
            connection.sock = plain
            if target.scheme == "https":
                connection.sock = self._tls.wrap_socket(plain, server_hostname=target.host)
            connection.sock.settimeout(_remaining_s(deadline))
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            for name, value in {"Host": target.authority, **_HEADERS}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with connection.getresponse() as response:
                yield response
        finally:
            timer.cancel()
            handle.close()
            connection.close()
            plain.close()

    def _connect(self, addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
        """Connect to the first address that answers."""
        until = min(deadline, time.monotonic() + CONNECT_S)
        for address in addresses:
            with suppress(OSError):
                return socket.create_connection((address, port), timeout=_remaining_s(until))
        raise _Refused("no connection")


def _parse(url: str) -> _Target:
    """Parse a URL. Raises _Refused and ValueError for everything that parsers disagree about."""
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
    """Whether a URL has none of what parsers disagree about: white space, control characters, "\\", "#"."""
    return 0 < len(url) <= MAX_URL and not any(c <= " " or c in "\\#\x7f" or c.isspace() for c in url)


def _body(response: HTTPResponse, deadline: float) -> bytes:
    if response.status != 200 or response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused(f"status {response.status}")
    if (response.length or 0) > MAX_BYTES:
        raise _Refused("size")
    body = bytearray()
    began = time.monotonic()
    while part := response.read1(65536):
        body += part
        elapsed_s = time.monotonic() - began
        if elapsed_s > SLOW_AFTER_S and len(body) < elapsed_s * LEAST_BYTES_PER_S:
            raise _Refused("too slow")
        if len(body) > MAX_BYTES:
            raise _Refused("size")
        _remaining_s(deadline)
    _remaining_s(deadline)  # a socket that the timer has shut down looks like an end of file
    if response.length:
        raise _Refused("cut short")
    return bytes(body)


def _remaining_s(deadline: float) -> float:
    """Return the seconds until a deadline. Raises _Refused after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise _Refused("time")
    return left


def _shut(handle: socket.socket) -> None:
    with suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)
