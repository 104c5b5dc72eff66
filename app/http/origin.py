"""Protection of a service without keys against web pages: a page of another site can make its visitor's
browser send requests to the loopback, also under a host name of its own that resolves there (DNS rebinding).
"""

import ipaddress
from urllib.parse import urlsplit

from flask import request

from addresses import split_address
from app.http.cors import is_listed
from config import Settings
from protocol.errors import Forbidden


class OriginCheck:
    """Refuses requests under foreign host names, or from pages of foreign sites, to a service on the
    loopback.

    CORS_ORIGINS names sites whose pages are served all the same.

    With API keys a page can't do harm; a service that listens on other addresses has names that nobody knows
    here.
    """

    def __init__(self, settings: Settings) -> None:
        self._active = not settings.api_keys and is_loopback(split_address(settings.bind)[0])
        urls = (settings.public_url, settings.service_url)
        self._listed = settings.cors_origins
        self._own = {host for url in urls if (host := urlsplit(url).hostname)}

    def check(self) -> None:
        """Raises Forbidden."""
        if not self._active:
            return
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        # a client without a Host header is no browser
        if host is not None and not self.is_own(f"//{host}"):
            raise Forbidden(
                "this Host is not a name of this server; set PUBLIC_URL to the address that clients use"
            )
        if origin is not None and not self.is_own(origin) and not is_listed(origin, self._listed):
            raise Forbidden(
                "without API_KEYS requests from pages of other sites are accepted only if CORS_ORIGINS has them"
            )

    def is_own(self, url: str) -> bool:
        """Whether the host of `url` is this server: PUBLIC_URL's, SERVICE_URL's or the loopback."""
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return False
        return host is not None and (host in self._own or is_loopback(host))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
