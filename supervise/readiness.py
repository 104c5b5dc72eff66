"""Asks the web process whether the service is ready, and in which state its workers are."""

import http.client
import json
import os
from collections import Counter
from typing import Any

from addresses import callable_address, split_address
from config import Settings

ANSWER_TIMEOUT_S = 3.0
_UP = ("ready", "drained")


class Probe:
    """A client of the web process that `settings` describe. It blocks, so call it from a thread."""

    def __init__(self, settings: Settings) -> None:
        self._address = callable_address(settings.bind)
        self._host, self.port = split_address(self._address)
        self._has_node = bool(settings.node_url)
        self._headers = {"Authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}

    @property
    def base_url(self) -> str:
        """The web process's URL as seen from this machine."""
        return f"http://{self._address}"

    def ready(self, web_pid: int | None = None) -> bool:
        """Whether `/readyz` answers 200; with `web_pid`, whether that process (gunicorn's master) does.

        Another service may have the address, while our own web process can't listen there.
        """
        status, body = self._get("/readyz")
        return status == 200 and web_pid in (None, body.get("master_pid"))

    def unregistered(self) -> str | None:
        """Return why a ready worker is not registered with the node, "" if none is missing there.

        None: a worker has not registered yet, nor failed to.
        """
        if not self._has_node:
            return ""
        rows = self._get("/v1/workers")[1].get("data", [])
        missing = [row for row in rows if row.get("state") == "ready" and not row.get("registered")]
        reasons = [str(row["last_error"]) for row in missing if row.get("last_error")]
        return reasons[0] if reasons else None if missing else ""

    def ready_workers(self) -> set[int]:
        """Return the process ids of this machine's workers that are ready, or were until an operator drained
        them."""
        host = os.uname().nodename
        rows = self._get("/v1/workers")[1].get("data", [])
        return {row["pid"] for row in rows if row.get("host") == host and row.get("state") in _UP}

    def progress(self) -> str:
        """Return one line with the number of workers of each model in each state."""
        rows = self._get("/v1/workers")[1].get("data", [])
        if not rows:
            return "no worker has reported yet"
        states = Counter((str(row.get("model")), str(row.get("state"))) for row in rows)
        models = sorted({model for model, _ in states})
        parts = [
            f"{model}: " + ", ".join(f"{n} {state}" for (m, state), n in sorted(states.items()) if m == model)
            for model in models
        ]
        if any(state == "drained" for _, state in states):
            parts.append("workers under drain wait for `flask --app wsgi workers resume --all`")
        return "; ".join(parts)

    def _get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and body, or (0, {}) without an answer."""
        connection = http.client.HTTPConnection(self._host, self.port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = json.loads(response.read())
            return response.status, body if isinstance(body, dict) else {}
        except (OSError, http.client.HTTPException, ValueError):
            return 0, {}
        finally:
            connection.close()
