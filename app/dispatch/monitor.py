"""Checks the requests for which no events arrive, all of them in one pipeline.

It fills gaps from the replay lists, fails requests whose worker is lost or whose data Redis has lost, and
sends ids again that were lost between the queue and a worker.
"""

import logging
import time

from app.dispatch.worker_view import WorkerView
from protocol import events
from protocol.connections import RedisClient
from protocol.errors import Cancelled, NoWorker, QueueUnavailable, ServiceError, WorkerLost
from protocol.event_router import EventRouter, Inbox
from protocol.names import Keys
from protocol.queue import JobQueue

log = logging.getLogger(__name__)

SILENCE_S = 2.0
"""A request without events for this long is checked."""
GAP_LIMIT_S = 10.0
"""A request fails when its replay list has not filled a gap for this long."""
ORPHAN_S = 5.0
"""An unclaimed id is sent again this long after its turn has passed."""
UNSERVED_S = 5.0
"""A waiting request fails when its model has had no worker, not even one that loads, for this long."""


class RequestMonitor:
    """Checks the requests of this web process whose events do not arrive.

    Called by the process's heartbeat.
    """

    def __init__(
        self, client: RedisClient, keys: Keys, worker_view: WorkerView, router: EventRouter, queue: JobQueue
    ) -> None:
        self._redis = client
        self._keys = keys
        self._worker_view = worker_view
        self._router = router
        self._queue = queue

    def check(self) -> None:
        """Check every silent request once. Raises redis.RedisError."""
        now = time.monotonic()
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

    def fill_gaps(self) -> None:
        """Read what is missing before events that have arrived. Raises redis.RedisError."""
        gapped = [
            inbox
            for inbox in self._router.inboxes()
            if inbox.gap_since is not None and inbox.admitted and not inbox.ended
        ]
        if gapped:
            self._look_up(gapped)

    def _look_up(self, silent: list[Inbox]) -> list[tuple[Inbox, str | None, bool, bool]]:
        """Feed the inboxes from the replay lists.

        Returns for each request the incarnation id that claimed it, whether its job still exists, and whether
        it was cancelled.
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
            # by somebody else than its client, which still waits for this process
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
            # the worker deletes the job after it has written the last event, which was not in the same
            # transaction
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
