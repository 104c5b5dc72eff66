"""Whether our web process answers at SERVICE_URL. Without it no worker may be registered."""

import json
from collections.abc import Callable

import requests

PROBE_TIMEOUT_S = 2.0
LONGEST_ANSWER = 1000
"""Bytes of an answer that are read."""


def http_probe(
    service_url: str,
    namespace: str,
    model: str,
    timeout_s: float = PROBE_TIMEOUT_S,
    *,
    setting: str = "SERVICE_URL",
) -> Callable[[], str]:
    """A probe that asks `GET {service_url}/healthz` for a web process of `namespace` that serves `model`.

    It returns "" if one answers, or what is wrong in one line that names the `setting`, and never raises.
    Another program at that address, or another deployment, would give the node's callers its 404 for every
    request.
    """
    stranger = (
        f"{setting} {service_url} is not answered by a web process of namespace {namespace!r} "
        f"that serves {model!r}"
    )

    def probe() -> str:
        try:
            with requests.Session() as session:
                # proxies of the environment are for other hosts
                session.trust_env = False
                answer = session.get(
                    f"{service_url}/healthz",
                    params={"namespace": namespace, "model": model},
                    timeout=timeout_s,
                    allow_redirects=False,
                    stream=True,
                )
                return "" if _is_served(answer) else f"{stranger} (HTTP {answer.status_code})"
        except (requests.RequestException, ValueError):
            return f"{setting} {service_url} does not answer"

    return probe


def _is_served(answer: requests.Response) -> bool:
    """Whether an answer to the probe says so. A stranger's may be of any length."""
    try:
        body = json.loads(next(answer.iter_content(LONGEST_ANSWER), b""))
    except ValueError:
        return False
    return answer.status_code == 200 and isinstance(body, dict) and body.get("serves") is True


class WebWatch:
    """Decides from probes: down after `max_failed` failures, up after `min_succeeded` successes in a row.

    Before it was ever up, one success is enough. `error`: the result of the last failed probe, "" while up.
    """

    def __init__(self, max_failed: int = 3, min_succeeded: int = 2) -> None:
        self.up = False
        self.ever_up = False
        self.error = ""
        self._max_failed = max_failed
        self._min_succeeded = min_succeeded
        self._contrary = 0

    def add(self, error: str) -> None:
        """Take one more probe into account; "" is a success."""
        succeeded = not error
        self._contrary = 0 if succeeded == self.up else self._contrary + 1
        needed = self._max_failed if self.up else self._min_succeeded if self.ever_up else 1
        if self._contrary >= needed:
            self.up = succeeded
            self.ever_up = self.ever_up or succeeded
            self._contrary = 0
        self.error = "" if self.up else error or self.error
