"""Streams that go on for a while without their client, and are continued for it by any web process."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import msgspec
from redis.exceptions import RedisError

from app.dispatch.event_reader import Client, EventReader
from app.dispatch.timings import Timings
from protocol.errors import NotFound
from protocol.event_router import EventRouter, Inbox
from protocol.open_requests import OpenRequests
from protocol.resumable_streams import ResumableStreams, StreamRecord, reader_name

UNKNOWN = (
    "no stream of this id can be resumed: it was never begun as resumable, or nobody has read it for too long"
)


class Resumption:
    """Begins and continues streams that can be resumed. One for each web process.

    `deadline_s`: of a request; `grace_s`: STREAM_GRACE_S. `owner`: who sends the current request, None for
    one whose streams can't be resumed (app.http.auth.Gate.caller).
    """

    def __init__(
        self,
        streams: ResumableStreams,
        router: EventRouter,
        requests: OpenRequests,
        *,
        web_id: str,
        deadline_s: float,
        grace_s: int,
        owner: Callable[[], str | None],
        draining_for_s: Callable[[], float],
    ) -> None:
        self._streams = streams
        self._router = router
        self._requests = requests
        self._web_id = web_id
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._owner = owner
        self._draining_for_s = draining_for_s

    def is_offered(self) -> bool:
        """Whether the stream of the current request can be resumable."""
        return self._grace_s > 0 and self._owner() is not None

    def begin(self, reader: EventReader, model: str, *, n: int, include_usage: bool, created: int) -> None:
        """Make a stream resumable whose first token has arrived. Raises QueueUnavailable."""
        name, times = self._new_reader(), reader.timings
        record = StreamRecord(
            model=model,
            n=n,
            include_usage=include_usage,
            created=created,
            deadline_s=self._deadline_s,
            queued_s=times.queued_s,
            first_token_s=times.first_token_s,
        )
        self._streams.begin(
            reader.request_id,
            record,
            reader=name,
            owner=self._owner() or "",
            grace_s=self._grace_s,
            elapsed_s=times.elapsed_s,
        )
        reader.make_resumable(name, self._close)

    def resume(self, request_id: str, client: Client) -> tuple[StreamRecord, EventReader]:
        """Continue a stream: the reader, which must be closed, has its events from the first on.

        Another connection that still reads it is ended. Raises NotFound, also for a stream of another API
        key, and QueueUnavailable.
        """
        owner = self._owner()
        name = self._new_reader()
        try:
            found = None if owner is None else self._streams.take_over(request_id, reader=name, owner=owner)
        except msgspec.MsgspecError:
            found = None
        if found is None:
            raise NotFound(UNKNOWN)
        record = found.record
        with suppress(RedisError):
            # a reader that is not told reads on, more slowly, and does not affect others
            self._router.tell_taken_over(request_id, found.reader_before)
        inbox = self._router.open(request_id, record.model)
        inbox.reader = name
        for envelope in found.envelopes:
            inbox.feed(envelope)
        # checked by the request monitor from the next second on: at first the worker publishes for the
        # earlier reader
        inbox.admitted, inbox.last_event_at = 1.0, 0.0
        reader = EventReader(
            inbox,
            client,
            ends_at=time.monotonic() + record.deadline_s - found.elapsed_s,
            draining_for_s=self._draining_for_s,
            on_close=self._close,
            cancelled_by_operator=self._requests.cancelled_by_operator,
            timings=Timings.resumed(found.elapsed_s, record.queued_s, record.first_token_s),
        )
        return record, reader

    def _new_reader(self) -> str:
        return reader_name(self._web_id, uuid.uuid4().hex[:12])

    def _close(self, inbox: Inbox, finished: bool) -> None:
        """Stop listening. The grace period begins, unless another reader has taken over."""
        self._router.close(inbox)
        with suppress(RedisError):
            # without the note the request ends at its deadline
            self._streams.leave(inbox.request_id, inbox.reader, finished=finished)
