"""What this web process knows of the workers: a snapshot of their leases, taken once a second by the monitor."""

import math
import time

from catalogue import ModelEntry
from protocol.leases import LEASE_TTL_S, Leases, WorkerRecord

LOOK_AGAIN_S = 0.1


class WorkerView:
    """Answers without a round trip. Until the first `refresh` nobody is known and Redis counts as unreached."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._records: list[WorkerRecord] = []
        self._refreshed_at = -math.inf
        self._reached_since: float | None = None

    def refresh(self) -> None:
        """Take a new snapshot. Raises redis.RedisError; then the old one stays and Redis counts as unreached."""
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
        """Redis answered the last time it was asked."""
        return self._reached_since is not None

    def records(self) -> list[WorkerRecord]:
        return self._records

    def has_ready(self, model: str, *, look_again: bool = False) -> bool:
        """Some worker serves `model` now. `look_again`: before a no, unless that was just done; raises redis.RedisError.

        The snapshot may be a second old: who has seen /readyz turn 200 through a sibling process is not to be refused.
        """
        found = any(record.model == model and record.state == "ready" for record in self._records)
        if found or not look_again or time.monotonic() - self._refreshed_at < LOOK_AGAIN_S:
            return found
        self.refresh()
        return self.has_ready(model)

    def missing(self, models: tuple[ModelEntry, ...]) -> list[str]:
        """Names of the models that no worker serves."""
        return [entry.name for entry in models if not self.has_ready(entry.name)]

    def is_lost(self, incarnation_id: str) -> bool:
        """That incarnation is gone for good: a newer one stands in its place, or its lease has lapsed.

        A missing lease counts only after this reader itself has reached Redis without failure for a whole lease:
        otherwise a Redis that stalled or came back empty would bury everyone.
        """
        cid = incarnation_id.rpartition(":")[0]
        record = next((record for record in self._records if record.cid == cid), None)
        if record is not None and record.state != "lost":
            return record.incarnation_id != incarnation_id
        return self._reached_since is not None and time.monotonic() - self._reached_since >= LEASE_TTL_S
