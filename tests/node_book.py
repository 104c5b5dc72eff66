"""How the node (v0.2.3) handles its calls: the order of its checks, its codes, its shapes.

Without sockets: tests/stand_in_node.py serves it.
"""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from tests.go_json import GoDecodeError, decode

Mode = Literal["ok", "slow", "refusing", "old", "unlisted"]
"""See StandInNode.behave."""

PEER_ID = "16Uiu2HAmStandInNodeOfTheTests"
MODEL = {"model": str, "api": str, "type": int, "cid": str}
PROJECT = {"project": str, "models": [MODEL]}
NOT_COLLECTING = 500, {"code": 1010, "message": "unsupported", "data": []}


class NodeBook:
    """The node's registrations and its answers. `projects`: entries {model, api, type, cid} by project."""

    def __init__(self) -> None:
        self.projects: dict[str, list[dict[str, Any]]] = {}
        self.mode: Mode = "ok"
        self.code = 1001

    def answer(self, method: str, path: str, raw: bytes) -> tuple[int, Any]:
        """Status and body: an object is sent as JSON, a string as text."""
        routes: dict[tuple[str, str], Callable[[bytes], tuple[int, Any]]] = {
            ("POST", "ai/model/register"): self._model_register,
            ("POST", "ai/model/unregister"): self._model_unregister,
            ("POST", "ai/project/register"): self._project_register,
            ("POST", "ai/project/unregister"): self._project_unregister,
            ("POST", "ai/project/peer"): self._projects_of_node,
            ("GET", "id"): lambda _: (200, {"peer_id": PEER_ID, "agent_version": "v0.2.3"}),
            # lists of the whole network, which most nodes, like this one, don't collect
            ("GET", "ai/projects/list"): lambda _: NOT_COLLECTING,
            ("GET", "ai/projects/models"): lambda _: NOT_COLLECTING,
        }
        name = path.partition("?")[0].removeprefix("/api/v0/")
        if self.mode == "old" and name.startswith("ai/model/"):
            return 404, "404 page not found"
        route = routes.get((method, name))
        if route is None:
            known = any(name == other for _, other in routes)
            return (405, "405 method not allowed") if known else (404, "404 page not found")
        if self.mode == "refusing" and name.endswith("register"):
            return (500 if self.code == 5000 else 400), _failure(self.code, "the test says no")
        try:
            return route(raw)
        except GoDecodeError as error:
            return 400, _failure(1002, f"body not understood: {error}")
        except _InvalidField as error:
            return 400, _failure(1001, str(error))

    def _model_register(self, raw: bytes) -> tuple[int, Any]:
        told = decode(raw, {"project": str, **MODEL}, trailing=True)
        _need(told["project"], "project is empty")
        _check_model(told)
        project = told.pop("project")
        entries = self.projects.setdefault(project, [])
        for index, entry in enumerate(entries):
            if (entry["model"], entry["cid"]) == (told["model"], told["cid"]):
                entries[index] = told
                return 200, {"message": "ok"}
        entries.append(told)
        return 200, {"message": "ok"}

    def _model_unregister(self, raw: bytes) -> tuple[int, Any]:
        told = decode(raw, {"project": str, "model": str, "cid": str}, trailing=True)
        _need(told["project"], "project is empty")
        _need(told["model"], "model is empty")
        entries = self.projects.get(told["project"], [])
        left = [entry for entry in entries if (entry["model"], entry["cid"]) != (told["model"], told["cid"])]
        if len(left) == len(entries):
            return 200, {"message": "not existed"}
        self.projects[told["project"]] = left
        if not left:
            del self.projects[told["project"]]
        return 200, {"message": "ok"}

    def _project_register(self, raw: bytes) -> tuple[int, Any]:
        told = decode(raw, PROJECT, trailing=True)
        _need(told["project"], "project is empty")
        for model in told["models"]:
            _check_model(model)
        self.projects[told["project"]] = told["models"]
        return 200, {"message": "ok"}

    def _project_unregister(self, raw: bytes) -> tuple[int, Any]:
        told = decode(raw, PROJECT, trailing=True)
        _need(told["project"], "project is empty")
        existed = self.projects.pop(told["project"], None) is not None
        return 200, {"message": "ok" if existed else "not existed"}

    def _projects_of_node(self, raw: bytes) -> tuple[int, Any]:
        told = decode(raw, {"node_id": str}, trailing=True)
        _need(told["node_id"], "node_id is empty")
        if told["node_id"] != PEER_ID:
            return 504, _failure(1004, "that peer did not answer")
        if self.mode == "unlisted":
            return NOT_COLLECTING
        spelled = {"model": "Model", "api": "API", "type": "Type", "cid": "CID"}
        return 200, {
            "data": {
                name: [{**{spelled[k]: v for k, v in entry.items()}, "Idle": 0} for entry in entries]
                for name, entries in self.projects.items()
            }
        }


class _InvalidField(Exception):
    """Raised for a field that the node refuses: 400, code 1001."""


def _failure(code: int, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}


def _need(value: str, complaint: str) -> None:
    if not value:
        raise _InvalidField(complaint)


def _check_model(told: dict[str, Any]) -> None:
    """Checks in the node's order: model, api, URL of api, cid. It does not look at `type`."""
    _need(told["model"], "model is empty")
    _need(told["api"], "api is empty")
    try:
        host = urlsplit(told["api"]).hostname or ""
    except ValueError as error:
        raise _InvalidField(f"api is not a URL: {error}") from error
    if host != "localhost" and not _is_own_address(host):
        raise _InvalidField(f"api: {host!r} is neither localhost nor an address of this machine")
    _need(told["cid"], "cid is empty")


def _is_own_address(host: str) -> bool:
    """Whether `host` is an address of this machine's interfaces; 127.0.0.2 and 0.0.0.0 are not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.is_unspecified or (address.is_loopback and str(address) not in ("127.0.0.1", "::1")):
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
