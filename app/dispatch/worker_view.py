"""A web process's view of the workers: a snapshot of their leases, taken every second by the monitor."""

import math
import time

from catalogue import ModelEntry
from protocol.leases import LEASE_TTL_S, Leases, WorkerRecord

LOOK_AGAIN_S = 0.1


class WorkerView:
    """Answers from the snapshot, without a round trip.

    Before the first `refresh` it has no workers, and Redis counts as unreachable.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._records: list[WorkerRecord] = []
        self._refreshed_at = -math.inf
        self._reached_since: float | None = None

    def refresh(self) -> None:
        """Take a new snapshot. Raises redis.RedisError; then the old one is kept and Redis is unreachable."""
        self._refreshed_at = time.monotonic()
        try:
            self._records = self._leases.workers()
        except Exception:
            self._reached_since = None
            raise
        if self._reached_since is None:
            self._reached_since = time.monotonic()

    @property
    def reachable(self) -> bool:
        """Whether the last `refresh` succeeded."""
        return self._reached_since is not None

    def records(self) -> list[WorkerRecord]:
        return self._records

    def has_ready(self, model: str, *, look_again: bool = False) -> bool:
        """Whether a worker is ready to serve `model`.

        With `look_again` a snapshot older than `LOOK_AGAIN_S` is refreshed before the answer is False, so
        that a client which saw /readyz turn 200 at another web process is not refused here. Raises
        redis.RedisError.
        """
        found = any(record.model == model and record.state == "ready" for record in self._records)
        if found or not look_again or time.monotonic() - self._refreshed_at < LOOK_AGAIN_S:
            return found
        self.refresh()
        return self.has_ready(model)

    def missing(self, models: tuple[ModelEntry, ...]) -> list[str]:
        """Return the names of the models for which no worker is ready."""
        return [entry.name for entry in models if not self.has_ready(entry.name)]

    def is_lost(self, incarnation_id: str) -> bool:
        """Whether that incarnation is gone: a newer one has its cid, or its lease has expired.

        A missing lease counts only after this process has reached Redis without failure for the time of a
        whole lease: otherwise a Redis that stalled, or came back empty, would make every worker look lost.
        """
        cid = incarnation_id.rpartition(":")[0]
        record = next((record for record in self._records if record.cid == cid), None)
        if record is not None and record.state != "lost":
            return record.incarnation_id != incarnation_id
        return self._reached_since is not None and time.monotonic() - self._reached_since >= LEASE_TTL_S
