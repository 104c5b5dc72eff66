"""A web process's view of the workers: a snapshot of their leases, taken every second by the heartbeat."""

import math
import time
from collections.abc import Callable, Sequence

from catalogue import ModelEntry
from protocol.leases import Leases, Observation, WorkerRecord

LOOK_AGAIN_S = 0.1
"""The shortest time between two snapshots that requests ask for."""


class WorkerView:
    """Answers from the snapshot, without a round trip.

    Before the first `refresh` it has no workers, and Redis counts as unreachable.
    """

    def __init__(self, leases: Leases, clock: Callable[[], float] = time.monotonic) -> None:
        self._leases = leases
        self._clock = clock
        self._records: list[WorkerRecord] = []
        self._refreshed_at = -math.inf
        self._observation = Observation(clock)
        self._served_at: dict[str, float] = {}

    def refresh(self) -> None:
        """Take a new snapshot. Raises redis.RedisError; then the old one is kept and Redis is unreachable."""
        self._refreshed_at = self._clock()
        try:
            self._records = self._leases.workers()
        except Exception:
            self._observation.interrupt()
            raise
        self._observation.seen()
        for record in self._records:
            if record.state in ("loading", "ready"):
                self._served_at[record.model] = self._refreshed_at

    @property
    def reachable(self) -> bool:
        """Whether the last `refresh` succeeded."""
        return not self._observation.interrupted

    def records(self) -> list[WorkerRecord]:
        """Return the workers of the snapshot, by model and cid."""
        return self._records

    def has_ready(self, model: str, *, look_again: bool = False) -> bool:
        """Whether a worker is ready to serve `model`.

        With `look_again` a snapshot older than `LOOK_AGAIN_S` is refreshed before the answer is False, so
        that a client which saw /readyz turn 200 at another web process is not refused here. Raises
        redis.RedisError.
        """
        found = any(record.model == model and record.state == "ready" for record in self._records)
        if found or not look_again or self._clock() - self._refreshed_at < LOOK_AGAIN_S:
            return found
        self.refresh()
        return self.has_ready(model)

    def rate(self, model: str) -> float:
        """Return the work that the workers of `model` finish in a second; 0 while one has a free slot or no
        rate."""
        ready = [record for record in self._records if record.model == model and record.state == "ready"]
        if any(record.running < record.slots or not record.rate for record in ready):
            return 0.0
        return sum(record.rate for record in ready)

    def max_model_len(self, model: str) -> int | None:
        """Return the tokens of prompt and answer that every ready worker of `model` takes; None if none says
        it."""
        known = [
            record.max_model_len
            for record in self._records
            if record.model == model and record.state == "ready" and record.max_model_len
        ]
        return min(known, default=None)

    def takes_images(self, model: str) -> bool:
        """Whether every ready worker of `model` takes images in messages. True while none is ready."""
        ready = [record for record in self._records if record.model == model and record.state == "ready"]
        return all(record.takes_images for record in ready)

    def unserved_s(self, model: str) -> float:
        """Return for how long, without a gap in observation, `model` has had no worker that is ready or
        loads."""
        since_served = self._refreshed_at - self._served_at.get(model, -math.inf)
        return min(self._observation.watched_s, since_served)

    def missing(self, models: Sequence[ModelEntry]) -> list[str]:
        """Return the names of the models for which no worker is ready."""
        return [entry.name for entry in models if not self.has_ready(entry.name)]

    def is_lost(self, incarnation_id: str) -> bool:
        """Whether that incarnation is gone: a newer one has its cid, or its lease has expired.

        A missing lease counts only after leases have been watched for long enough (`Observation`).
        """
        cid = incarnation_id.rpartition(":")[0]
        record = next((record for record in self._records if record.cid == cid), None)
        if record is not None and record.state != "lost":
            return record.incarnation_id != incarnation_id
        return self._observation.absence_counts()
