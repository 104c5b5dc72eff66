"""Checks of this machine: weights and their disks, the hub's folder, and the limit of open files."""

import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.commands.checks.finding import Finding, failed, passed, warned
from catalogue import Catalogue, ModelEntry
from config import hub_folder
from protocol.leases import WorkerRecord

GIB = 2**30
FULL_BYTES = 1 * GIB
HUB_ROOM_BYTES = 50 * GIB
"""Room for weights that are not downloaded yet; a model of 8 billion parameters takes 16 GiB."""
DESCRIPTORS_OF_PROCESS = 4096 + 256
"""Open streams of a web process (`worker_connections` of gunicorn.conf.py), and everything else."""
FEWEST_DESCRIPTORS = 1024
_ECHO = "echo:"


def check_weights(catalogue: Catalogue, records: Sequence[WorkerRecord] | None) -> Iterator[Finding]:
    """The weights of each model. `records`: None if they could not be read."""
    hub = []
    for entry in catalogue.models:
        folder = Path(entry.weights).expanduser()
        if entry.weights.startswith(_ECHO):
            continue
        if folder.exists() or entry.weights_folder is not None:
            yield _check_folder(entry, folder, records or ())
        else:
            hub.append(entry.weights)
    if hub:
        yield _check_hub(hub_folder(), hub)


def _check_folder(entry: ModelEntry, folder: Path, records: Sequence[WorkerRecord]) -> Finding:
    check = f"weights of {entry.name}"
    if (wanted := entry.lacks(folder)) is not None:
        hosts = {r.host for r in records if r.model == entry.name and r.state != "lost"}
        if hosts and os.uname().nodename not in hosts:
            return passed(check, f"{folder} is not here: its workers run on {', '.join(sorted(hosts))}")
        what = f"has no {wanted}" if folder.is_dir() else "does not exist or is no folder"
        return failed(check, f"{folder} {what}; correct `weights` in the catalogue, or mount its disk")
    free = shutil.disk_usage(folder).free
    if free < FULL_BYTES:
        return warned(check, f"the disk of {folder} has {_gib(free)} free; make room")
    return passed(check, f"{folder}, {_gib(free)} free")


def _check_hub(folder: Path, hub_ids: Sequence[str]) -> Finding:
    """The folder to which the hub's weights are downloaded."""
    missing = [name for name in hub_ids if not (folder / f"models--{name.replace('/', '--')}").is_dir()]
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    shown = f"{folder}, {_gib(free)} free"
    if not missing:
        return passed("hub", f"{shown}, has all models")
    wanted = f"to be downloaded: {', '.join(missing)}"
    if not os.access(existing, os.W_OK):
        return failed("hub", f"{existing} can't be written to, {wanted}; set HF_HOME")
    if free < FULL_BYTES:
        return failed("hub", f"{shown}, {wanted}; make room, or set HF_HOME to another disk")
    if free < HUB_ROOM_BYTES:
        return warned("hub", f"{shown}, {wanted}; it may not be enough")
    return passed("hub", f"{shown}, {wanted}")


def check_descriptors() -> Finding:
    """The hard limit of open files: a web process raises its own to it, and needs one for each open
    stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS_OF_PROCESS:
        shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        return passed("open files", f"{shown} for each process that is started from here")
    found = (
        f"{hard} for each process that is started from here, a web process may need {DESCRIPTORS_OF_PROCESS}"
    )
    advice = "raise `ulimit -Hn`, systemd's LimitNOFILE or Docker's --ulimit nofile"
    if hard < FEWEST_DESCRIPTORS:
        return failed("open files", f"{found}; {advice}")
    return warned("open files", f"{found} for its open streams; {advice}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
