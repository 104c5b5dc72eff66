"""Whether the web process of this machine answers: the node calls it, so a worker behind a dead one must not be advertised."""

from collections.abc import Callable

import requests

PROBE_TIMEOUT_S = 2.0


def http_probe(service_url: str, timeout_s: float = PROBE_TIMEOUT_S) -> Callable[[], bool]:
    """A probe of `GET {service_url}/healthz`. Never raises.

    Any answer below 500 is a sign of life: the listener that only the node uses (NODE_BIND) has no /healthz, a 404
    from it is as good. A 502 is a front whose service is gone.
    """

    def probe() -> bool:
        try:
            with requests.Session() as session:
                session.trust_env = False
                answer = session.get(
                    f"{service_url}/healthz", timeout=timeout_s, allow_redirects=False, stream=True
                )
                return answer.status_code < 500
        except (requests.RequestException, ValueError):
            return False

    return probe


class WebWatch:
    """Judges the probes: down after `downs` failed ones in a row, up after `ups` good ones. At the start one suffices."""

    def __init__(self, downs: int = 3, ups: int = 2) -> None:
        self.up = False
        self.ever_up = False
        self._downs = downs
        self._ups = ups
        self._against = 0

    def saw(self, good: bool) -> None:
        """One more probe. What agrees with the present judgement forgives what spoke against it."""
        if good == self.up:
            self._against = 0
            return
        self._against += 1
        needed = self._downs if self.up else self._ups if self.ever_up else 1
        if self._against >= needed:
            self.up = good
            self.ever_up = self.ever_up or good
            self._against = 0
