"""Checks of the addresses that the web process listens on, and of the URLs under which others reach it."""

import errno
from collections.abc import Iterator

from addresses import callable_address, check_free
from app.commands.checks.finding import Finding, failed, passed, warned
from catalogue import Catalogue
from config import Settings
from node.web_watch import http_probe


def check_web(settings: Settings, namespace: str, catalogue: Catalogue) -> Iterator[Finding]:
    """Each listener and each URL."""
    model = catalogue.models[0].name
    listeners = [("BIND", settings.bind)]
    if settings.api_keys:
        listeners.append(("NODE_BIND", settings.node_bind))
    findings = [_check_listener(name, address, namespace, model) for name, address in listeners]
    yield from (finding for finding, _ in findings)
    runs = findings[0][1]
    if settings.node_url:
        yield _check_url("SERVICE_URL", settings.service_url, namespace, model, runs)
    yield _check_url("PUBLIC_URL", settings.public_url, namespace, model, runs)


def _check_listener(name: str, address: str, namespace: str, model: str) -> tuple[Finding, bool]:
    """The finding, and whether this deployment listens there."""
    try:
        check_free(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = error.strerror or error
            return failed(name, f"{address} can't be listened on: {reason}; correct {name}"), False
        if http_probe(f"http://{callable_address(address)}", namespace, model)():
            return failed(
                name,
                f"{address} is in use by another program or deployment, or by a web process that hangs;"
                f" stop it or change {name}",
            ), False
        return passed(name, f"{address} is served by this deployment"), True
    return passed(name, f"{address} is free: no web process listens there"), False


def _check_url(name: str, url: str, namespace: str, model: str, runs: bool) -> Finding:
    reason = http_probe(url, namespace, model, setting=name)()
    if not reason:
        return passed(name, f"{url} reaches this deployment")
    if not runs:
        return warned(name, f"{reason}; start the service, then check again")
    return failed(name, f"{reason}, seen from this machine; correct {name}, or the proxy or firewall there")
