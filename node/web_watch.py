"""Whether the web process of this machine answers. Without it no worker may be registered."""

from collections.abc import Callable

import requests

PROBE_TIMEOUT_S = 2.0


def http_probe(service_url: str, timeout_s: float = PROBE_TIMEOUT_S) -> Callable[[], bool]:
    """A probe of `GET {service_url}/healthz`. Never raises.

    Any status below 500 counts as an answer: the listener for the node alone (NODE_BIND) has no /healthz
    and answers 404. A 502 comes from a proxy whose service is down.
    """

    def probe() -> bool:
        try:
            with requests.Session() as session:
                # proxies of the environment are for other hosts
                session.trust_env = False
                answer = session.get(
                    f"{service_url}/healthz", timeout=timeout_s, allow_redirects=False, stream=True
                )
                return answer.status_code < 500
        except (requests.RequestException, ValueError):
            return False

    return probe


class WebWatch:
    """Decides from probes: down after `max_failed` failures, up after `min_succeeded` successes in a row.

    Before it was ever up, one success is enough.
    """

    def __init__(self, max_failed: int = 3, min_succeeded: int = 2) -> None:
        self.up = False
        self.ever_up = False
        self._max_failed = max_failed
        self._min_succeeded = min_succeeded
        self._contrary = 0

    def add(self, succeeded: bool) -> None:
        """Take one more probe into account."""
        if succeeded == self.up:
            self._contrary = 0
            return
        self._contrary += 1
        needed = self._max_failed if self.up else self._min_succeeded if self.ever_up else 1
        if self._contrary >= needed:
            self.up = succeeded
            self.ever_up = self.ever_up or succeeded
            self._contrary = 0
