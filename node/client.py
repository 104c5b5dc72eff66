"""The client of the network node: the standard's four calls (section 2), the node's own list, and what we tell it of a model.

Knows neither leases nor threads: who registers, and when, is decided by node/registrar.py (its own entry),
node/reconciler.py (entries that nobody stands for) and node/cli.py (a person). What the real node does beyond the
standard's text stands beside the line that minds it.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import requests

from catalogue import TASKS, ModelEntry
from config import Settings
from protocol.leases import WorkerRecord

MODEL_REGISTER = "/api/v0/ai/model/register"
MODEL_UNREGISTER = "/api/v0/ai/model/unregister"
PROJECT_REGISTER = "/api/v0/ai/project/register"
PROJECT_UNREGISTER = "/api/v0/ai/project/unregister"
NODE_ID = "/api/v0/id"
PROJECTS_OF_NODE = "/api/v0/ai/project/peer"

PATIENT_TIMEOUT_S = 15.0
"""How long a node that let a call time out may take from then on: slower than usual is not the same as gone."""


@dataclass(frozen=True)
class Registration:
    """One entry of the node's list. `type`: 0 text to text, 1 text to image, 2 image to image (standard, section 2)."""

    project: str
    model: str
    api: str
    type: Literal[0, 1, 2]
    cid: str


Siblings = Callable[[], Iterable[Registration]]
"""Our other entries at the same node. Asked only when the node is too old to take one model at a time."""


class NodeError(Exception):
    """A call to the node failed. The message is one line without line breaks, fit for `/v1/workers`.

    `kind`: "unreachable" (nobody answers), "timeout" (no answer in time: it may still be carried out), "refused" (an
    answer other than success; `code` is the node's own when it gave one), "too_old" (it has no such call).
    """

    def __init__(
        self,
        kind: Literal["unreachable", "timeout", "refused", "too_old"],
        message: str,
        code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code


class NodeClient:
    """Calls one node. Every method is one exchange (`models`: two) and raises NodeError.

    `timeout_s` bounds connecting and each wait for an answer. After a timeout a call may take PATIENT_TIMEOUT_S, until
    one is answered in `timeout_s` again; a method's own `timeout_s` overrules both. Safe for several threads.
    """

    def __init__(
        self, node_url: str, timeout_s: float = 3.0, patient_timeout_s: float = PATIENT_TIMEOUT_S
    ) -> None:
        self.url = node_url
        self._timeout_s = timeout_s
        self._patient_timeout_s = max(patient_timeout_s, timeout_s)
        self._patient = False

    def register_model(
        self, registration: Registration, *, siblings: Siblings | None = None, timeout_s: float | None = None
    ) -> None:
        """Add or update one entry; safe to repeat. With `siblings`, a node before v0.2.1 is told the whole project."""
        try:
            self._call("POST", MODEL_REGISTER, _body(registration), timeout_s)
        except NodeError as error:
            if error.kind != "too_old" or siblings is None:
                raise
            self._replace(registration.project, [*siblings(), registration], timeout_s)

    def unregister_model(
        self,
        project: str,
        model: str,
        cid: str,
        *,
        siblings: Siblings | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Remove one entry. Success too when the node didn't have it (it answers 200, "not existed")."""
        try:
            self._call("POST", MODEL_UNREGISTER, {"project": project, "model": model, "cid": cid}, timeout_s)
        except NodeError as error:
            if error.kind != "too_old" or siblings is None:
                raise
            self._replace(project, [entry for entry in siblings() if entry.cid != cid], timeout_s)

    def register_project(self, project: str, registrations: Iterable[Registration]) -> None:
        """Replace the project's whole list: entries of others in it are gone. Only for a person's command."""
        self._replace(project, registrations, None)

    def unregister_project(self, project: str) -> None:
        """Remove the project with everybody's models. Only for a person's command. Unknown: success."""
        self._call("POST", PROJECT_UNREGISTER, {"project": project}, None)

    def models(self) -> list[Registration]:
        """All entries of this node, every project's.

        `/ai/projects/list` and `/ai/projects/models` would be the wrong calls: they answer for the whole network, with
        names alone, and only on nodes that collect their peers (others: 500, code 1010). The node's own list is what
        it tells about the peer that it is itself.
        """
        peer_id = self._call("GET", NODE_ID, None, None).get("peer_id")
        answer = self._call("POST", PROJECTS_OF_NODE, {"node_id": peer_id}, None)
        try:
            projects: dict[str, list[dict[str, Any]]] = answer.get("data") or {}
            return [
                _parse(project, entry) for project, entries in projects.items() for entry in entries or []
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NodeError("too_old", f"node {self.url} lists its models in an unknown form") from error

    def _replace(self, project: str, registrations: Iterable[Registration], timeout_s: float | None) -> None:
        """project/register. As the fallback for old nodes it can do less than the calls for one model.

        Those nodes know no cid, so the workers of one model share one entry; and whatever others registered in the
        same project is dropped from it. What we list is our living workers, so a dead one goes with the next call.
        """
        models = [{k: v for k, v in _body(entry).items() if k != "project"} for entry in registrations]
        self._call("POST", PROJECT_REGISTER, {"project": project, "models": models}, timeout_s)

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        usual = self._patient_timeout_s if self._patient else self._timeout_s
        started = time.monotonic()
        try:
            # a connection of its own for each call: calls are rare, and a restarted node leaves no stale one behind
            with requests.Session() as session:
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
            raise NodeError("timeout", f"node {self.url} did not answer within {waited:.1f} s") from error
        except (requests.RequestException, ValueError) as error:
            raise NodeError("unreachable", f"node {self.url} is unreachable: {_reason(error)}") from error
        self._patient = time.monotonic() - started >= self._timeout_s
        return self._judge(path, response)

    def _judge(self, path: str, response: requests.Response) -> dict[str, Any]:
        """The answer's body. Success is a 2xx whose `code` is 0 or, as the real node has it, missing."""
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            if response.status_code == 404:
                raise NodeError(
                    "too_old", f"node {self.url} has no {path}: it is older than v0.2.1, or no node"
                )
            raise NodeError(
                "refused", f"node {self.url} answered HTTP {response.status_code} without a JSON object"
            )
        code, message = body.get("code") or 0, _one_line(body.get("message") or "no reason given")
        if code != 0 or not response.ok:
            number = code if isinstance(code, int) else None
            raise NodeError("refused", f"node {self.url} refused: {message} (code {code})", number)
        return body


def registration_for(entry: ModelEntry, settings: Settings, project: str, cid: str) -> Registration | None:
    """What the node is told of one worker of `entry`; None where the node does not know what the model does.

    The host of SERVICE_URL must be `localhost` or an address of the node's machine, or the node refuses it (code 1001).
    """
    return _registration(project, entry.name, entry.tasks, settings.service_url, cid)


def registrations_of(records: Iterable[WorkerRecord], settings: Settings) -> list[Registration]:
    """The entries that this machine's node should have: one for each ready worker that registers there."""
    found = [
        _registration(record.project, record.model, record.tasks, settings.service_url, record.cid)
        for record in records
        if record.state == "ready" and is_of_node(record, settings)
    ]
    return [registration for registration in found if registration is not None]


def _registration(
    project: str, model: str, tasks: tuple[str, ...], service_url: str, cid: str
) -> Registration | None:
    """A model of both image tasks is registered once, at the generations URL: the node posts its edits there too."""
    for task in TASKS.values():
        if task.name in tasks and task.node_type is not None:
            return Registration(project, model, service_url + task.path, task.node_type, cid)
    return None


def is_of_node(record: WorkerRecord, settings: Settings) -> bool:
    """Whether this worker registers with the node of this process (same URL and same machine's SERVICE_ID)."""
    return bool(record.node) and record.node == settings.node_url and record.service_id == settings.service_id


def default_cid(service_id: str, namespace: str, *parts: str) -> str:
    """The cid of a worker that was given none: the same after a restart, and ours by form (`is_ours`).

    `parts` tell this worker from its siblings: host, GPU UUIDs or CPU slot, model.
    """
    return _cid_prefix(service_id, namespace) + _hex("\0".join(parts), 10)


def is_ours(cid: str, service_id: str, namespace: str) -> bool:
    """Whether `default_cid` of this deployment made `cid`. Another NAMESPACE on the same node never matches."""
    return re.fullmatch(re.escape(_cid_prefix(service_id, namespace)) + "[0-9a-f]{10}", cid) is not None


def _cid_prefix(service_id: str, namespace: str) -> str:
    return f"{service_id}-{_hex(namespace, 6)}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _body(registration: Registration) -> dict[str, Any]:
    """Every field always: the node takes a missing one for empty, and an absent `type` for 0."""
    return {
        "project": registration.project,
        "model": registration.model,
        "api": registration.api,
        "type": registration.type,
        "cid": registration.cid,
    }


def _parse(project: str, entry: dict[str, Any]) -> Registration:
    """One entry as the node lists it; its documentation and its answers spell the names in different cases."""
    fields = {name.lower(): value for name, value in entry.items()}
    return Registration(
        project, fields["model"], fields["api"], fields.get("type") or 0, fields.get("cid") or ""
    )


def _reason(error: Exception) -> str:
    """The innermost cause in a few words, without the addresses of objects that urllib3 puts in its texts."""
    seen: BaseException = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        seen = inner
    return _one_line(getattr(seen, "strerror", None) or str(seen) or type(seen).__name__)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
