"""Removes entries from the node that no living worker stands for. It registers nothing.

The node keeps an entry indefinitely, so somebody must notice workers that were killed. One web process of
the machine that has the node does, chosen by a lease. A missing lease or record is weak evidence, so any
gap in observation restarts the waiting period (`protocol.leases.Observation`).
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from redis.exceptions import RedisError

from node.backoff import Backoff
from node.client import NodeClient, NodeError
from node.deployment import Deployment, Mark, worker_of
from node.election import Election, Result
from node.lock import NodeLock
from node.registration import Registration
from protocol.leases import LEASE_TTL_S, Leases, Observation, WorkerRecord

log = logging.getLogger(__name__)

ELECTION_TTL_S = 15.0


@dataclass(frozen=True)
class Timing:
    """Seconds. A missing lease counts after `lost_after_s` of watching without a gap, a missing record after
    `unknown_after_s`: by then a worker that lives has written its record again.

    With a lease's 10 s, `every_s` leaves a killed worker on the node for 13 s. `show_lost_s`: how long a
    lost worker stays in /v1/workers.
    """

    every_s: float = 3.0
    lost_after_s: float = LEASE_TTL_S
    unknown_after_s: float = 3.0 * LEASE_TTL_S
    read_list_every_s: float = 60.0
    backoff_max_s: float = 30.0
    show_lost_s: float = 60.0


class Reconciler:
    """One thread (a greenlet under gunicorn) in each web process; only the elected one acts."""

    def __init__(
        self,
        election: Election,
        leases: Leases,
        node: NodeClient,
        lock: NodeLock,
        *,
        deployment: Deployment,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._election = election
        self._leases = leases
        self._node = node
        self._lock = lock
        self._deployment = deployment
        self._timing = timing or Timing()
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._observation = Observation(clock)
        self._unregistered: dict[tuple[str, str], float] = {}
        """Cid and incarnation id of lost workers that aren't on the node any more, and since when."""
        self._listed: list[Registration] = []
        """The node's entries, as they were last read."""
        self._orphans: dict[Registration, float] = {}
        """Entries of ours that no worker stands for, and since when."""
        self._backoff = Backoff(self._timing.every_s, self._timing.backoff_max_s)
        self._read_list_at = 0.0
        self._last_error = ""

    def start(self) -> None:
        """Begin. Comes after the fork: threads don't survive one."""
        self._thread.start()

    def stop(self) -> None:
        """End after the round in progress and let another process take over."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.round()
            self._stop.wait(self._timing.every_s)
        try:
            self._election.resign()
        except RedisError as error:
            log.info("the reconciler's lease was not released, it expires: %s", error)

    def round(self) -> None:
        """Look at the leases once, and make at most a few calls to the node. Never raises."""
        try:
            self._round()
        except RedisError as error:
            self._observation.interrupt()
            self._report(f"Redis can't be reached: {error}")
        except Exception:
            # nobody else removes lost workers from the node, so this thread must go on
            self._observation.interrupt()
            log.exception("a round of the reconciler failed")

    def _round(self) -> None:
        held = self._election.hold()
        if held is not Result.KEPT:
            # another watched until now, or this process's own lease was missing, as may be those of workers
            self._observation.interrupt()
        if held is Result.OTHER:
            return
        records = self._leases.workers()
        self._observation.seen()
        now = self._clock()
        try:
            self._unregister_leftovers(records, now)
            self._read_list(now)
        except NodeError as error:
            self._report(str(error))

    def _read_list(self, now: float) -> None:
        """Read the node's list, once in `read_list_every_s`. Raises NodeError."""
        if now >= self._read_list_at:
            self._read_list_at = now + self._timing.read_list_every_s
            self._listed = self._node.models()
            self._last_error = ""

    def _unregister_leftovers(self, records: list[WorkerRecord], now: float) -> None:
        """Remove what is due, unless the node has failed a moment ago. Raises NodeError."""
        stale = [entry for entry in self._listed if self._is_orphan(entry, records)]
        self._orphans = {entry: self._orphans.get(entry, now) for entry in stale}
        if not self._observation.absence_counts(self._timing.lost_after_s):
            return
        self._forget_unregistered(records, now)
        if now < self._backoff.retry_at:
            return
        try:
            self._unregister_lost(records, now)
            self._unregister_orphans(now)
        except NodeError:
            self._backoff.failed(now)
            raise
        self._backoff.reset()

    # ----- workers whose lease has expired

    def _unregister_lost(self, records: list[WorkerRecord], now: float) -> None:
        """Remove lost workers of this node from it, each incarnation once. Raises NodeError."""
        for record in records:
            incarnation = (record.cid, record.incarnation_id)
            if record.state != "lost" or incarnation in self._unregistered:
                continue
            if not self._deployment.has_worker(record):
                continue
            if self._unregister(record.project, record.model, record.cid, _still_lost(record)):
                log.warning("worker %s was lost: unregistered", record.cid)
                self._unregistered[incarnation] = now

    def _forget_unregistered(self, records: list[WorkerRecord], now: float) -> None:
        """Delete the records of lost workers that aren't on the node and were shown for long enough."""
        lost = {(record.cid, record.incarnation_id): record for record in records if record.state == "lost"}
        self._unregistered = {key: since for key, since in self._unregistered.items() if key in lost}
        for key, record in lost.items():
            if not record.node:
                self._unregistered.setdefault(key, now)
            if now - self._unregistered.get(key, now) >= self._timing.show_lost_s:
                self._leases.forget_worker(record.cid)

    # ----- entries that no worker stands for

    def _unregister_orphans(self, now: float) -> None:
        """Remove the entries that no worker has stood for during `unknown_after_s`. Raises NodeError."""
        for entry, since in self._orphans.items():
            if min(now - since, self._observation.watched_s) < self._timing.unknown_after_s:
                continue
            if self._unregister(entry.project, entry.model, entry.cid, partial(self._is_orphan, entry)):
                log.warning("no worker stands for %s: unregistered", entry.cid)
            self._listed.remove(entry)

    def _is_orphan(self, entry: Registration, records: list[WorkerRecord]) -> bool:
        """Whether an entry is stale, save those of workers that `_unregister_lost` sees to."""
        worker = worker_of(entry, records)
        if worker is not None and self._deployment.has_worker(worker):
            return False
        return self._deployment.mark(entry, records) is Mark.STALE

    # ----- the node

    def _unregister(
        self, project: str, model: str, cid: str, still: Callable[[list[WorkerRecord]], bool]
    ) -> bool:
        """Unregister if `still` holds for the records read while this process has its turn at the node.

        A worker renews its lease before it waits for a turn to register. So a new incarnation either shows
        in these records, or registers after this call.
        """
        with self._lock.turn() as mine:
            if not mine or not still(self._leases.workers()):
                return False
            self._node.unregister_model(project, model, cid)
            return True

    def _report(self, error: str) -> None:
        """Log what failed, unless it was the last thing logged; a list that could be read ends that."""
        if error != self._last_error:
            log.warning("reconciler: %s", error)
        self._last_error = error


def _still_lost(record: WorkerRecord) -> Callable[[list[WorkerRecord]], bool]:
    wanted = (record.cid, record.incarnation_id, "lost")
    return lambda records: any((other.cid, other.incarnation_id, other.state) == wanted for other in records)
