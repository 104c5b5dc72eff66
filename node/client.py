"""The HTTP client of the network node, v0.2.1 or newer: its calls for models and projects, and its own list.

Who registers, and when, is decided by node/registrar.py (a worker's own entry), node/reconciler.py (entries
without a worker) and node/cli.py (a person). docs/node.md says how the node behaves.
"""

import time
from collections.abc import Iterable
from typing import Any

import requests

from node.registration import Registration

MODEL_REGISTER = "/api/v0/ai/model/register"
MODEL_UNREGISTER = "/api/v0/ai/model/unregister"
PROJECT_REGISTER = "/api/v0/ai/project/register"
PROJECT_UNREGISTER = "/api/v0/ai/project/unregister"
NODE_ID = "/api/v0/id"
PROJECTS_OF_NODE = "/api/v0/ai/project/peer"

PATIENT_TIMEOUT_S = 15.0
"""How long calls may take after one has timed out: the node may be slower than usual and still answer."""


class NodeError(Exception):
    """Base: a call to the node failed. The message is one line, shown as `last_error` in /v1/workers."""


class NodeUnreachable(NodeError):
    """Raised when nothing answers at NODE_URL, or what answers doesn't speak HTTP."""


class NodeTimeout(NodeError):
    """Raised when no answer came in time. The node may still carry the call out."""


class NodeRefused(NodeError):
    """Raised for an answer other than success. `code`: the node's own, if it gave one."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class NodeUnsupported(NodeRefused):
    """Raised when the node lacks the call: it is older than v0.2.1, or no node."""


class NodeClient:
    """Calls one node. Every method is one exchange (`models`: two) and raises NodeError.

    `timeout_s` bounds connecting and each wait for an answer. After a timeout calls may take
    `patient_timeout_s`, until one is answered within `timeout_s` again; a method's own `timeout_s`
    overrides both. Safe for several threads.
    """

    def __init__(
        self, node_url: str, timeout_s: float = 3.0, patient_timeout_s: float = PATIENT_TIMEOUT_S
    ) -> None:
        self.url = node_url
        self._timeout_s = timeout_s
        self._patient_timeout_s = max(patient_timeout_s, timeout_s)
        self._patient = False

    def register_model(self, registration: Registration) -> None:
        """Add or update one entry; safe to repeat."""
        self._call("POST", MODEL_REGISTER, {"project": registration.project, **_model(registration)})

    def unregister_model(self, project: str, model: str, cid: str, *, timeout_s: float | None = None) -> None:
        """Remove one entry. Succeeds too when the node doesn't have it (it answers 200, "not existed")."""
        body = {"project": project, "model": model, "cid": cid}
        self._call("POST", MODEL_UNREGISTER, body, timeout_s)

    def register_project(self, project: str, registrations: Iterable[Registration]) -> None:
        """Replace the project's whole list, with the entries of others in it. Only for a person's command."""
        self._call("POST", PROJECT_REGISTER, {"project": project, "models": [*map(_model, registrations)]})

    def unregister_project(self, project: str) -> None:
        """Remove the project with everybody's models, if it exists. Only for a person's command."""
        self._call("POST", PROJECT_UNREGISTER, {"project": project})

    def models(self) -> list[Registration]:
        """All entries of this node, in all projects.

        Read as what the node tells of one peer, itself. `/ai/projects/list` and `/ai/projects/models` are
        no help: they cover the whole network, give names alone, and fail on nodes that don't collect their
        peers (500, code 1010).
        """
        peer_id = self._call("GET", NODE_ID).get("peer_id")
        answer = self._call("POST", PROJECTS_OF_NODE, {"node_id": peer_id})
        try:
            projects: dict[str, list[dict[str, Any]]] = answer.get("data") or {}
            return [
                _parse(project, entry) for project, entries in projects.items() for entry in entries or []
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NodeUnsupported(f"node {self.url} lists its models in an unknown form") from error

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        usual = self._patient_timeout_s if self._patient else self._timeout_s
        started = time.monotonic()
        try:
            # a connection of its own for each call: calls are rare, and a node that restarts breaks idle ones
            with requests.Session() as session:
                # proxies of the environment are for other hosts
                session.trust_env = False
                response = session.request(
                    method,
                    self.url + path,
                    json=body,
                    timeout=(min(usual, self._timeout_s), usual) if timeout_s is None else timeout_s,
                    allow_redirects=False,
                )
        except requests.Timeout as error:
            self._patient = True
            waited = time.monotonic() - started
            raise NodeTimeout(f"node {self.url} did not answer within {waited:.1f} s") from error
        except (requests.RequestException, ValueError) as error:
            raise NodeUnreachable(f"node {self.url} is unreachable: {_reason(error)}") from error
        self._patient = time.monotonic() - started >= self._timeout_s
        return self._parse_answer(path, response)

    def _parse_answer(self, path: str, response: requests.Response) -> dict[str, Any]:
        """The answer's body; success is a 2xx with `code` 0 or, as nodes send it, none.

        Raises NodeRefused.
        """
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            status = response.status_code
            if status == 404:
                raise NodeUnsupported(f"node {self.url} has no {path}: node v0.2.1 or newer is needed")
            raise NodeRefused(f"node {self.url} answered HTTP {status} without a JSON object")
        code, message = body.get("code") or 0, _one_line(body.get("message") or "no reason given")
        if code != 0 or not response.ok:
            number = code if isinstance(code, int) else None
            raise NodeRefused(f"node {self.url} refused: {message} (code {code})", number)
        return body


def _model(registration: Registration) -> dict[str, Any]:
    """An entry as the node takes it. It reads missing fields as empty, and a missing `type` as 0."""
    return {
        "model": registration.model,
        "api": registration.api,
        "type": registration.type,
        "cid": registration.cid,
    }


def _parse(project: str, entry: dict[str, Any]) -> Registration:
    """An entry as the node lists it; its documentation and its answers spell the names in different cases."""
    fields = {name.lower(): value for name, value in entry.items()}
    return Registration(
        project, fields["model"], fields["api"], fields.get("type") or 0, fields.get("cid") or ""
    )


def _reason(error: Exception) -> str:
    """The innermost cause in a few words, without urllib3's addresses of objects."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return _one_line(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
