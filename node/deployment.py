"""Which workers and which of the node's entries are this deployment's.

The reconciler, `node list`, `node prune` and `node register-project` all decide here, so that they agree.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from catalogue import TASKS
from config import Settings
from node.registration import Registration, cid_prefix, registration_of
from protocol.leases import UNREADABLE, WorkerRecord


class Mark(StrEnum):
    """How an entry of the node and the workers fit together."""

    OK = "ok"
    MISSING = "missing"
    CHANGING = "changing"
    STALE = "stale"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Deployment:
    """The processes of one namespace that stand beside one node: same NODE_URL, same SERVICE_ID."""

    settings: Settings
    namespace: str
    project: str

    def has_worker(self, record: WorkerRecord) -> bool:
        """Whether this worker registers with our node. SERVICE_ID separates machines with one NODE_URL."""
        settings = self.settings
        return (
            bool(record.node)
            and record.node == settings.node_url
            and record.service_id == settings.service_id
        )

    def registrations(self, records: Iterable[WorkerRecord]) -> list[Registration]:
        """The entries that our node should have: one for each ready worker that registers there."""
        found = [
            registration_of(record, self.settings.service_url)
            for record in records
            if record.state == "ready" and self.has_worker(record)
        ]
        return [registration for registration in found if registration is not None]

    def is_ours(self, entry: Registration) -> bool:
        """Whether this deployment made an entry of our node's list, now or in an earlier run.

        Its cid has the form that `default_cid` makes, or it points at our own URL, where no other
        deployment can listen: then it is ours with any cid, such as one of a former host name. Entries of
        other projects never are.
        """
        if entry.project != self.project:
            return False
        prefix = re.escape(cid_prefix(self.settings.service_id, self.namespace))
        made_here = re.fullmatch(prefix + "[0-9a-f]{10}", entry.cid) is not None
        return made_here or entry.api in {self.settings.service_url + task.path for task in TASKS.values()}

    def mark(self, entry: Registration, records: Iterable[WorkerRecord]) -> Mark:
        """Compare one entry of our node's list with the workers. Never `MISSING`."""
        worker = worker_of(entry, records)
        if worker is not None and worker.state != "lost":
            return Mark.OK if entry in self.registrations([worker]) else Mark.CHANGING
        left_by_worker = worker is not None and self.has_worker(worker)
        return Mark.STALE if left_by_worker or self.is_ours(entry) else Mark.FOREIGN


def worker_of(entry: Registration, records: Iterable[WorkerRecord]) -> WorkerRecord | None:
    """The worker that an entry names, living or lost. With another model the cid is another worker's."""

    def fits(record: WorkerRecord) -> bool:
        return record.state == UNREADABLE or (record.project, record.model) == (entry.project, entry.model)

    return next((record for record in records if record.cid == entry.cid and fits(record)), None)
