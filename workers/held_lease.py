"""This worker's lease, from the first renewal, which takes it, until the process stops."""

import logging
import threading
import time
from collections.abc import Callable

from protocol.leases import REFRESH_S, Leases, WorkerRecord

log = logging.getLogger(__name__)

STOP_S = 5.0
"""Above the time limit of a command to Redis."""


class WorkerReplaced(Exception):
    """Raised when another worker holds the lease of this one's cid. It started later, as each takes the lease
    at its start.
    """


class HeldLease:
    """Takes and renews the lease: every REFRESH_S, and at once when the record has changed.

    `get_record` returns the record to write. `changed` is set by others when that record has changed.
    `on_expired` is called when the lease had expired, after which others may have taken this worker for lost.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        get_record: Callable[[], WorkerRecord],
        changed: threading.Event,
        on_expired: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changed = changed
        self._leases = leases
        self._get_record = get_record
        self._on_expired = on_expired
        self._clock = clock
        self._stopping = False
        self._renewing = threading.Lock()
        self._renew_at = 0.0
        self._renewed_once = False

    def renew_if_due(self) -> bool:
        """Renew the lease if it is due; returns whether it was.

        Raises WorkerReplaced and redis.RedisError.
        """
        if self.changed.is_set():
            self.changed.clear()
            self._renew_at = 0.0
        if self._clock() < self._renew_at:
            return False
        record, now = self._get_record(), self._clock()
        with self._renewing:
            if self._stopping:
                return False
            hold = self._leases.renew_worker if self._renewed_once else self._leases.seize_worker
            before = hold(record)
        self._renew_at = now + REFRESH_S
        if self._renewed_once and not before:
            log.warning("the lease had expired")
            self._on_expired()
        elif self._renewed_once and before != record.incarnation_id:
            raise WorkerReplaced
        self._renewed_once = True
        return True

    def stop(self) -> None:
        """Renew no more. Waits up to STOP_S for a renewal in progress, which would undo a release."""
        self._stopping = True
        self.changed.set()
        if self._renewing.acquire(timeout=STOP_S):
            self._renewing.release()
