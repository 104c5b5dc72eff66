"""What is registered with the node for a worker, and the cid of a worker without WORKER_CID."""

import hashlib
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
    """What is registered for one worker of `entry`; None if the node has no type for the model's tasks.

    The host of SERVICE_URL must be `localhost` or an address of the node's machine, or the node refuses it
    (code 1001).
    """
    return _registration(project, entry.name, entry.tasks, settings.service_url, cid)


def has_node_type(tasks: Iterable[str]) -> bool:
    """Whether the node knows one of these tasks. Workers without such a task are never registered."""
    return any(task.name in tasks and task.node_type is not None for task in TASKS.values())


def registration_of(record: WorkerRecord, service_url: str) -> Registration | None:
    """The same, read from a worker's record."""
    return _registration(record.project, record.model, record.tasks, service_url, record.cid)


def _registration(
    project: str, model: str, tasks: tuple[str, ...], service_url: str, cid: str
) -> Registration | None:
    """A model of both image tasks is registered once, at the generations URL; it gets edits there too."""
    for task in TASKS.values():
        if task.name in tasks and task.node_type is not None:
            return Registration(project, model, service_url + task.path, task.node_type, cid)
    return None


def default_cid(service_id: str, namespace: str, *parts: str) -> str:
    """The cid of a worker without WORKER_CID: the same after a restart.

    `parts` tell the workers of a deployment apart: host, GPU UUIDs, Celery node name, model.
    """
    return cid_prefix(service_id, namespace) + _hex("\0".join(parts), 10)


def cid_prefix(service_id: str, namespace: str) -> str:
    """What all default cids of a deployment begin with. Another NAMESPACE on the same machine has another."""
    return f"{service_id}-{_hex(namespace, 6)}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
