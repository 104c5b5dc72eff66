"""Checks once a second on the requests for which no events arrive, all of them in one pipeline.

It fills gaps from the replay lists, fails requests whose worker is lost or whose data Redis has lost, sends
ids again that were lost between the queue and a worker, deletes the replay lists of finished requests, writes
what the process did and renews its lease, with which its metrics are written.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from redis.exceptions import RedisError

from app.dispatch.activity import Activity
from app.dispatch.worker_view import WorkerView
from protocol import events
from protocol.connections import RedisClient
from protocol.errors import Cancelled, NoWorker, QueueUnavailable, ServiceError, WorkerLost
from protocol.event_router import EventRouter, Inbox
from protocol.leases import REFRESH_S, Leases
from protocol.names import Keys
from protocol.queue import JobQueue

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
SILENCE_S = 2.0
"""A request without events for this long is checked."""
GAP_LIMIT_S = 10.0
"""A request fails when its replay list has not filled a gap for this long."""
ORPHAN_S = 5.0
"""An unclaimed id is sent again this long after its turn has passed."""
UNSERVED_S = 5.0
"""A waiting request fails when its model has had no worker, not even one that loads, for this long."""


class RequestMonitor(threading.Thread):
    """One thread in each web process (a greenlet under gunicorn)."""

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        *,
        web_id: str,
        leases: Leases,
        worker_view: WorkerView,
        router: EventRouter,
        queue: JobQueue,
        activity: Activity,
        publish_metrics: Callable[[], None],
    ) -> None:
        """`publish_metrics` is called with each renewal of the lease, and may raise redis.RedisError."""
        super().__init__(name="monitor", daemon=True)
        self._redis = client
        self._keys = keys
        self._web_id = web_id
        self._leases = leases
        self._worker_view = worker_view
        self._router = router
        self._queue = queue
        self._activity = activity
        self._publish_metrics = publish_metrics
        self._renew_at = 0.0
        self._refusal = ""
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the thread after the check that is running. Does not wait for it."""
        self._stopping.set()

    def run(self) -> None:
        """Check until `stop` is called, then release the lease of this process."""
        while not self._stopping.is_set():
            try:
                self.tick()
            except RedisError as error:
                log.warning("Redis can't be reached: %s", error)
            except Exception:
                # without this thread, a request whose worker died would wait until its deadline
                log.exception("request monitor failed; it continues")
            self._stopping.wait(INTERVAL_S)
        try:
            self._activity.write()
            self._publish_metrics()
            self._leases.release_web(self._web_id)
        except RedisError:
            log.info("Redis can't be reached: the lease of this process was not released and will expire")

    @property
    def refusal(self) -> str:
        """Why Redis refused the last write, "" if it took it. One that is full or a replica answers reads all the same."""
        return self._refusal

    def tick(self) -> None:
        """Check every silent request once. Raises redis.RedisError."""
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew(now)
        self._worker_view.refresh()
        self._queue.sweep()
        # _renew tells of a Redis that refuses writes; requests are checked all the same
        with suppress(RedisError):
            self._activity.write()
        silent = [inbox for inbox in self._router.inboxes() if _is_silent(inbox, now)]
        if not silent:
            return
        unclaimed = []
        for inbox, claim, job_exists, cancelled in self._look_up(silent):
            if inbox.ended or not _is_silent(inbox, time.monotonic()):
                continue
            if failure := self._find_failure(inbox, claim, job_exists, cancelled):
                inbox.fail(events.Failed.of(failure))
            elif inbox.incarnation_id is None and claim is None:
                unclaimed.append(inbox)
        self._send_again(unclaimed)

    def _renew(self, now: float) -> None:
        """Renew the lease of this process. A Redis that refuses it must not keep requests from being checked."""
        try:
            self._leases.renew_web(self._web_id)
        except RedisError as error:
            if not self._refusal:
                log.warning("Redis refuses to write: %s", error)
            self._refusal = str(error) or type(error).__name__
        else:
            self._refusal = ""
            self._renew_at = now + REFRESH_S
            self._publish_metrics()

    def _look_up(self, silent: list[Inbox]) -> list[tuple[Inbox, str | None, bool, bool]]:
        """Feed the inboxes from the replay lists.

        Returns for each request the incarnation id that claimed it, whether its job still exists, and whether it was
        cancelled.
        """
        with self._redis.pipeline(transaction=True) as pipe:
            for inbox in silent:
                # event `seq` is at index `seq` or later, because repeated writes only add duplicates
                pipe.lrange(self._keys.replay(inbox.request_id), inbox.next_seq, -1)
                pipe.get(self._keys.claim(inbox.request_id))
                pipe.exists(self._keys.job(inbox.request_id))
                pipe.exists(self._keys.cancel(inbox.request_id))
            replies = pipe.execute()
        found = []
        for inbox, entries, claim, job_exists, cancelled in zip(
            silent, replies[::4], replies[1::4], replies[2::4], replies[3::4], strict=True
        ):
            for envelope in sorted(events.decode_readable(entries), key=lambda envelope: envelope.seq):
                inbox.feed(envelope)
            found.append((inbox, claim.decode() if claim else None, bool(job_exists), bool(cancelled)))
        return found

    def _find_failure(
        self, inbox: Inbox, claim: str | None, job_exists: bool, cancelled: bool
    ) -> ServiceError | None:
        """Return the reason why no more events can come, or None."""
        incarnation_id = inbox.incarnation_id or claim
        if incarnation_id is None and cancelled:
            # not by its client, for which this process waits
            return Cancelled()
        if incarnation_id is None:
            return self._find_failure_of_waiting(inbox, job_exists)
        if claim is None:
            return QueueUnavailable(
                "the queue lost its data while this request was running; send the request again"
            )
        if self._worker_view.is_lost(incarnation_id):
            return WorkerLost()
        if not job_exists:
            # the worker deletes the job after it has written the last event, which was not in the same transaction
            return QueueUnavailable("the worker could not deliver the response; send the request again")
        if inbox.gap_since is not None and time.monotonic() - inbox.gap_since > GAP_LIMIT_S:
            return QueueUnavailable("a part of the response was lost; send the request again")
        return None

    def _find_failure_of_waiting(self, inbox: Inbox, job_exists: bool) -> ServiceError | None:
        if not job_exists:
            return QueueUnavailable(
                "the queue lost its data while this request was waiting; send the request again"
            )
        if self._worker_view.unserved_s(inbox.model) >= UNSERVED_S:
            return NoWorker(f"no worker serves model {inbox.model!r} any more; try again soon")
        return None

    def _send_again(self, unclaimed: list[Inbox]) -> None:
        """Queue the ids of requests again, once each, that no worker claimed although their turn has passed.

        A worker that stops may have taken an id from the queue without claiming it.
        """
        models = sorted({inbox.model for inbox in unclaimed})
        if not models:
            return
        with self._redis.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.llen(self._keys.queue_list(model))
                pipe.get(self._keys.youngest_claimed(model))
            replies = pipe.execute()
        queues = dict(zip(models, zip(replies[::2], replies[1::2], strict=True), strict=True))
        now = time.monotonic()
        for inbox in unclaimed:
            queued, youngest = queues[inbox.model]
            passed_over = queued == 0 or (youngest is not None and float(youngest) > inbox.admitted)
            if not passed_over:
                inbox.orphan_since = None
            elif inbox.orphan_since is None:
                inbox.orphan_since = now
            elif now - inbox.orphan_since >= ORPHAN_S and not inbox.resent:
                inbox.resent = True
                log.warning(
                    "request %s was lost between the queue and a worker: queued again", inbox.request_id
                )
                try:
                    self._queue.send_again(inbox.request_id, inbox.model)
                except QueueUnavailable as error:
                    inbox.fail(events.Failed.of(error))


def _is_silent(inbox: Inbox, now: float) -> bool:
    """Whether a request is admitted and not ended, and has a gap in its events or none for `SILENCE_S`."""
    if not inbox.admitted or inbox.ended:
        return False
    return inbox.gap_since is not None or now - inbox.last_event_at >= SILENCE_S
