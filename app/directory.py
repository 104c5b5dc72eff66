"""What this web process knows of the workers: a snapshot of their leases, taken once a second by the patrol."""

import math
import time

from config import ModelEntry
from protocol.leases import LEASE_TTL_S, Leases, WorkerRecord


class Directory:
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

    def refresh_if_older(self, seconds: float) -> None:
        """`refresh`, unless the last one is no older than that. Raises redis.RedisError."""
        if time.monotonic() - self._refreshed_at > seconds:
            self.refresh()

    @property
    def reachable(self) -> bool:
        """Redis answered the last time it was asked."""
        return self._reached_since is not None

    def records(self) -> list[WorkerRecord]:
        return self._records

    def has_ready(self, model: str) -> bool:
        """Some worker serves `model` now."""
        return any(record.model == model and record.state == "ready" for record in self._records)

    def missing(self, models: tuple[ModelEntry, ...]) -> list[str]:
        """Names of the models that no worker serves."""
        return [entry.name for entry in models if not self.has_ready(entry.name)]

    def is_lost(self, boot: str) -> bool:
        """That incarnation is gone for good: a newer one stands in its place, or its lease has lapsed.

        A missing lease counts only after this reader itself has reached Redis without failure for a whole lease:
        otherwise a Redis that stalled or came back empty would bury everyone.
        """
        cid = boot.rpartition(":")[0]
        record = next((record for record in self._records if record.cid == cid), None)
        if record is not None and record.state != "lost":
            return record.boot != boot
        return self._reached_since is not None and time.monotonic() - self._reached_since >= LEASE_TTL_S
