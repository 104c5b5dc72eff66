"""Records of workers for tests that need one."""

from typing import Any

from protocol.leases import WorkerRecord


def worker_record(cid: str = "cid", **fields: Any) -> WorkerRecord:
    """A record with plausible fields; its incarnation id is the cid with `:1`."""
    given: dict[str, Any] = {
        "incarnation_id": f"{cid}:1",
        "model": "echo",
        "tasks": ("chat",),
        "project": "P",
        "pid": 1,
        "host": "h",
        "service_id": "s",
        "node": "",
        "gpus": [],
    }
    return WorkerRecord(cid=cid, **(given | fields))
