"""Takes entries off the node that no living worker stands for. It never registers, and never touches what isn't ours.

The node keeps an entry indefinitely, so somebody must notice workers that were killed. One web process of the machine
that has the node does, chosen by a lease. A missing lease or record is weak evidence, so any gap in observation restarts
the waiting period (`protocol.leases.Observation`).
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import RedisError

from catalogue import Catalogue
from config import Settings
from node.client import NodeClient, NodeError, Registration, is_of_node, is_ours
from node.election import Election
from node.lock import NodeLock
from protocol.connections import RedisClient
from protocol.leases import LEASE_TTL_S, Leases, Observation, WorkerRecord
from protocol.names import Keys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds. A missing lease counts after `lost_after_s` of watching without a gap, a missing record after
    `unknown_after_s`: by then a worker that lives has written its record again.

    With a lease's 10 s, `every_s` leaves a killed worker on the node for 13 s. `show_lost_s`: how long a lost worker
    stays in /v1/workers.
    """

    every_s: float = 3.0
    lost_after_s: float = LEASE_TTL_S
    unknown_after_s: float = 3.0 * LEASE_TTL_S
    look_every_s: float = 60.0
    backoff_most_s: float = 30.0
    show_lost_s: float = 60.0
    election_ttl_s: float = 15.0


class Reconciler:
    """One thread (a greenlet under gunicorn) of each web process; those that weren't chosen stand by."""

    def __init__(
        self,
        election: Election,
        leases: Leases,
        node: NodeClient,
        lock: NodeLock,
        *,
        settings: Settings,
        namespace: str,
        project: str,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._election = election
        self._leases = leases
        self._node = node
        self._lock = lock
        self._settings = settings
        self._namespace = namespace
        self._project = project
        self._timing = timing or Timing()
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._observation = Observation(clock)
        self._taken_off: dict[
            tuple[str, str], float
        ] = {}  # cid and incarnation_id of lost workers that the node lacks by now
        self._suspects: dict[Registration, float] = {}  # entries without a record, and since when
        self._bury_at = self._look_at = 0.0
        self._failures = 0
        self._complaint = ""

    def start(self) -> None:
        """Begin. Comes after the fork: threads don't survive one."""
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the round under way and let another process take over."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.round()
            self._stop.wait(self._timing.every_s)
        try:
            self._election.resign()
        except RedisError as error:
            log.info("the reconciler's lease was not given back, it lapses by itself: %s", error)

    def round(self) -> None:
        """One look at the leases, with at most a few calls to the node. Never raises."""
        try:
            self._round()
        except RedisError as error:
            self._observation.interrupt()
            self._complain(f"Redis can't be reached: {error}")
        except Exception:
            # nobody else takes lost workers off the node, so this thread must go on
            self._observation.interrupt()
            log.exception("a round of the reconciler failed")

    def _round(self) -> None:
        held = self._election.hold()
        if held != "kept":
            # another watched until now, or this process's own lease was missing: then so may be those of workers
            self._observation.interrupt()
        if held == "other":
            return
        records = self._leases.workers()
        self._observation.seen()
        now = self._clock()
        if self._observation.absence_counts(self._timing.lost_after_s):
            self._forget_shown(records, now)
            self._attempt(self._bury, records, now)
        self._attempt(self._sweep, records, now)

    # ----- workers whose lease lapsed

    def _bury(self, records: list[WorkerRecord], now: float) -> None:
        """Take lost workers of this node off it, each incarnation once. Raises NodeError."""
        if now < self._bury_at:
            return
        # what follows if it fails: failures in a row make the next try rarer
        self._bury_at = now + min(self._timing.backoff_most_s, self._timing.every_s * 2**self._failures)
        self._failures = min(self._failures + 1, 8)
        for record in records:
            who = (record.cid, record.incarnation_id)
            if record.state != "lost" or who in self._taken_off or not is_of_node(record, self._settings):
                continue
            if self._take_off(record.project, record.model, record.cid, _still_lost(record)):
                log.warning("worker %s was lost and is taken off the node", record.cid)
                self._taken_off[who] = now
        self._bury_at, self._failures = now, 0

    def _forget_shown(self, records: list[WorkerRecord], now: float) -> None:
        """Drop the records of lost workers that were shown long enough and have nothing left at a node."""
        lost = {(record.cid, record.incarnation_id): record for record in records if record.state == "lost"}
        self._taken_off = {who: since for who, since in self._taken_off.items() if who in lost}
        for who, record in lost.items():
            if not record.node:
                self._taken_off.setdefault(who, now)
            if now - self._taken_off.get(who, now) >= self._timing.show_lost_s:
                self._leases.forget_worker(record.cid)

    # ----- entries without a worker

    def _sweep(self, records: list[WorkerRecord], now: float) -> None:
        """Take entries off the node whose cid is ours by form and which no record has stood for. Raises NodeError."""
        known = {record.cid for record in records}
        if now >= self._look_at:
            self._look_at = now + self._timing.look_every_s
            ours = [entry for entry in self._node.models() if self._is_ours(entry)]
            self._complaint = ""
            self._suspects = {entry: self._suspects.get(entry, now) for entry in ours}
        self._suspects = {entry: since for entry, since in self._suspects.items() if entry.cid not in known}
        for entry, since in list(self._suspects.items()):
            unknown_for_s = min(now - since, self._observation.watched_s)
            if unknown_for_s < self._timing.unknown_after_s:
                continue
            if self._take_off(entry.project, entry.model, entry.cid, _unknown(entry)):
                log.warning("nobody stands for %s: taken off the node", entry.cid)
            del self._suspects[entry]

    def _is_ours(self, entry: Registration) -> bool:
        ours = is_ours(entry.cid, self._settings.service_id, self._namespace)
        return ours and entry.project == self._project

    # ----- the node

    def _take_off(
        self, project: str, model: str, cid: str, still: Callable[[list[WorkerRecord]], bool]
    ) -> bool:
        """Unregister if `still` holds when it is our turn. A worker renews its lease before it takes a turn to
        register, so what is judged inside ours can't be registered by its next incarnation before we have done."""
        with self._lock.turn() as mine:
            if not mine or not still(self._leases.workers()):
                return False
            try:
                self._node.unregister_model(project, model, cid)
            except NodeError as error:
                if error.kind != "too_old":
                    raise
                # such a node takes whole projects only: our other workers there leave this one out with their next list
                log.info("%s: %s", cid, error)
            return True

    def _attempt(self, step: Callable[..., None], *args: object) -> None:
        try:
            step(*args)
        except NodeError as error:
            self._complain(str(error))

    def _complain(self, text: str) -> None:
        """Once for each change, not every three seconds."""
        if text != self._complaint:
            log.warning("reconciler: %s", text)
        self._complaint = text


def _still_lost(record: WorkerRecord) -> Callable[[list[WorkerRecord]], bool]:
    who = (record.cid, record.incarnation_id, "lost")
    return lambda records: any((other.cid, other.incarnation_id, other.state) == who for other in records)


def _unknown(entry: Registration) -> Callable[[list[WorkerRecord]], bool]:
    return lambda records: all(other.cid != entry.cid for other in records)


def build_reconciler(
    settings: Settings,
    catalogue: Catalogue,
    namespace: str,
    client: RedisClient,
    keys: Keys,
    leases: Leases,
    *,
    timing: Timing | None = None,
) -> Reconciler | None:
    """The reconciler of this process's node; None without NODE_URL. Nothing connects yet."""
    if not settings.node_url:
        return None
    timing = timing or Timing()
    key = keys.reconciler(settings.node_url, settings.service_id)
    return Reconciler(
        Election(client, key, timing.election_ttl_s),
        leases,
        NodeClient(settings.node_url),
        NodeLock(client, keys, settings.node_url, settings.service_id),
        settings=settings,
        namespace=namespace,
        project=catalogue.project,
        timing=timing,
    )
