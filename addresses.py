"""Checks of the addresses and URLs among the settings. Each check raises ValueError with one sentence.

A message never quotes a URL that may hold a password.
"""

import ipaddress
import re
import socket
from urllib.parse import parse_qsl, urlsplit

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^:\[\]]+|\[[^\[\]]+\])(:(?P<port>[1-9][0-9]{0,4}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_REDIS_SCHEMES = ("redis", "rediss")
_REDIS_OPTIONS = {
    "ssl_cert_reqs": ("required", "optional", "none"),
    "ssl_check_hostname": ("true", "false"),
    "ssl_ca_certs": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
}
"""What redis-py and Celery both read from a rediss:// URL, with the values that both know."""
_ESCAPED = "a password's / must be written as %2F, ? as %3F, # as %23, [ as %5B, ] as %5D, % as %25"


def split_address(address: str) -> tuple[str, int]:
    """Split `127.0.0.1:1088`, `localhost:1088` or `[::1]:1088` into host and port."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid = _is_ipv6(host)
    else:
        valid = _HOST_NAME.fullmatch(host) is not None
    if not valid or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port, such as 127.0.0.1:1088 or [::1]:1088")
    return host, int(port)


def check_free(address: str) -> None:
    """Listen on host:port for a moment. Raises OSError, with EADDRINUSE where another program does."""
    host, port = split_address(address)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # gunicorn sets this too: connections of an earlier run in TIME_WAIT don't matter
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def callable_address(address: str) -> str:
    """Return host:port at which this machine reaches a listener on `address`.

    A listener on every address (0.0.0.0, [::]) is reached on the loopback of the same family.
    """
    host, port = split_address(address)
    if is_unspecified(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_unspecified(host: str) -> bool:
    """Whether `host` means every address of the machine: 0.0.0.0, its short form 0, or ::."""
    if ":" in host:
        return _is_ipv6(host) and ipaddress.IPv6Address(host).is_unspecified
    try:
        return socket.inet_aton(host) == bytes(4)
    except OSError:
        return False


def check_http_url(url: str) -> None:
    """Check a URL that others call."""
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:
        host = None
    if not host:
        raise ValueError("is not a URL such as http://127.0.0.1:1088")
    if is_unspecified(host):
        raise ValueError(f"{host} is an address to listen on, which can't be called")


def check_origin(origin: str) -> None:
    """Check that an origin is written as browsers send it: it is compared character by character."""
    if not _is_origin(origin):
        raise ValueError(
            f"{origin!r} is not an origin as browsers send it: scheme://host or scheme://host:port in lower "
            "case, without a path and without the scheme's default port"
        )


def _is_origin(origin: str) -> bool:
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        return False
    scheme, host, port = parts["scheme"], parts["host"], parts["port"]
    if port is not None and (int(port) > 65535 or port == _DEFAULT_PORTS.get(scheme)):
        return False
    if host.startswith("["):
        address = host[1:-1]
        return _is_ipv6(address) and str(ipaddress.IPv6Address(address)) == address
    return host == host.lower() and _HOST_NAME.fullmatch(host) is not None


def check_redis_url(url: str) -> None:
    """Check that redis-py and Celery will read the same from the URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"is not redis://:password@host:6379/0; {_ESCAPED}") from None
    if parts.scheme not in _REDIS_SCHEMES:
        raise ValueError(
            "must begin with redis:// or rediss://; sockets, Sentinel and clusters are not supported"
        )
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(f"is not redis://:password@host:6379/0; {_ESCAPED}")
    if not host:
        raise ValueError("names no host; redis://127.0.0.1:6379/0 would be one")
    if not re.fullmatch("/?|/[0-9]{1,9}", parts.path):
        raise ValueError("ends with a database that is not a number; redis://127.0.0.1:6379/0 has database 0")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        _check_redis_option(parts.scheme, name, value)


def _check_redis_option(scheme: str, name: str, value: str) -> None:
    if scheme != "rediss" or name not in _REDIS_OPTIONS:
        known = f"rediss:// takes {', '.join(_REDIS_OPTIONS)}; redis:// takes none"
        raise ValueError(f"has an unknown option {name!r}; {known}")
    values = _REDIS_OPTIONS[name]
    if values is not None and value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}")


def without_password(redis_url: str) -> str:
    """Return a valid REDIS_URL as a message may show it."""
    parts = urlsplit(redis_url)
    _, separator, address = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{'…@' if separator else ''}{address}{parts.path}"


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
