"""What the node is told of a worker, and which of its entries are this deployment's."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from catalogue import TASKS, ModelEntry
from config import Settings
from protocol.leases import WorkerRecord


@dataclass(frozen=True)
class Registration:
    """One entry of the node's list. `type`: 0 text to text, 1 text to image, 2 image to image."""

    project: str
    model: str
    api: str
    type: int
    cid: str


def registration_for(entry: ModelEntry, settings: Settings, project: str, cid: str) -> Registration | None:
    """What the node is told of one worker of `entry`; None if the node has no type for the model's tasks.

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
    """Whether this worker registers with the node of this process (same NODE_URL, same machine's SERVICE_ID)."""
    return bool(record.node) and record.node == settings.node_url and record.service_id == settings.service_id


def default_cid(service_id: str, namespace: str, *parts: str) -> str:
    """The cid of a worker that was given none: the same after a restart, and recognised by `is_ours`.

    `parts` tell the workers of a deployment apart: host, GPU UUIDs or Celery node name, model.
    """
    return _cid_prefix(service_id, namespace) + _hex("\0".join(parts), 10)


def is_ours(cid: str, service_id: str, namespace: str) -> bool:
    """Whether `default_cid` of this deployment made `cid`. Another NAMESPACE on the same node never matches."""
    return re.fullmatch(re.escape(_cid_prefix(service_id, namespace)) + "[0-9a-f]{10}", cid) is not None


def _cid_prefix(service_id: str, namespace: str) -> str:
    return f"{service_id}-{_hex(namespace, 6)}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
