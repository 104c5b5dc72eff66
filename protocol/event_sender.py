"""The worker's half of the event stream: one thread writes the events of all requests, a script call a batch.

Each event is appended to its request's replay list; all events for one web process are published as one
message, except very large ones. Writing is idempotent, since readers order by sequence number and drop
duplicates: a write that may or may not have happened is repeated, for at most `RESEND_S`. After that its
requests are given up.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis.exceptions import NoPermissionError, RedisError

from protocol import events
from protocol.connections import RedisClient
from protocol.events import Delta, Envelope, Event
from protocol.names import Keys

log = logging.getLogger(__name__)

RESEND_S = 10.0
RETRY_PAUSE_S = 0.25
PENDING_LIMIT = 150_000
"""So many events may wait for a Redis that doesn't answer; with more, requests are given up. A GPU makes some
10,000 in a second, and they should outlast RESEND_S; each takes about 300 bytes."""

MESSAGE_LIMIT = 4 * 2**20
"""Bytes of one published message. A web process that reads slowly may have some of them waiting, and Redis
closes a subscription on which more than 32 MiB wait, which delays all streams of that process. Events that
don't fit, such as the vectors or the tokens of a very large request, are in the replay list alone."""
SMALL_EVENT = 64 * 2**10
"""Bytes of an event that is published in any case: the reader learns of a missing one by the next."""

# KEYS: the replay lists of the requests that have new events.
# ARGV: number of channels, then for each its name and message; then for each replay list its TTL in seconds
# (0: the list must exist already), the number of new entries, and the entries.
# Returns the length of each list, 0 where it should have existed and didn't.
# One script: a pipeline with a command for each request takes the worker ten times as long, and the engine
# waits for the interpreter's lock meanwhile.
_WRITE = """
local position = 0
local function next_argument()
  position = position + 1
  return ARGV[position]
end

for _ = 1, next_argument() do
  local channel = next_argument()
  redis.call('PUBLISH', channel, next_argument())
end

local lengths = {}
for number, replay_list in ipairs(KEYS) do
  local ttl, length = tonumber(next_argument()), 0
  -- RPUSHX: a new list would lack its beginning and its TTL
  local push = ttl > 0 and 'RPUSH' or 'RPUSHX'
  for _ = 1, next_argument() do length = redis.call(push, replay_list, next_argument()) end
  if ttl > 0 then redis.call('EXPIRE', replay_list, ttl) end
  lengths[number] = length
end
return lengths
"""

OnEnd = Callable[[Event | None], None]
"""Called once for each request, in the sender's thread: with the terminal event that was written, or with
None when the request's events can't be delivered."""

Observe = Callable[[Event], None]
"""Called in the thread that emits, with each event of a request but plain text after the first (`seq` 0 is
Started)."""


class _Outgoing:
    """One open request. `written`: its replay list exists."""

    __slots__ = ("next_seq", "observe", "on_end", "ttl_s", "web_id", "written")

    def __init__(self, web_id: str, ttl_s: int, on_end: OnEnd, observe: Observe) -> None:
        self.web_id = web_id
        self.ttl_s = ttl_s
        self.on_end = on_end
        self.observe = observe
        self.next_seq = 0
        self.written = False


class EventSender(threading.Thread):
    """Numbers and writes events. `emit` never waits for Redis; all writing happens in this thread.

    `prepare` may replace an event by the one to send (an image's bytes by its name in the store); it runs
    in this thread and may raise RedisError.
    """

    def __init__(self, client: RedisClient, keys: Keys, *, prepare: Callable[[Event], Event]) -> None:
        super().__init__(name="event-sender", daemon=True)
        self._write_script = client.register_script(_WRITE)
        self._keys = keys
        self._prepare = prepare
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._open: dict[str, _Outgoing] = {}
        self._pending: list[Envelope] = []
        self._stopping = False

    def open(
        self,
        request_id: str,
        web_id: str,
        ttl_s: int,
        on_end: OnEnd,
        observe: Observe = lambda event: None,
    ) -> None:
        """Begin a request's stream. Events of requests without one are dropped."""
        with self._lock:
            self._open[request_id] = _Outgoing(web_id, ttl_s, on_end, observe)

    def emit(self, new_events: Sequence[tuple[str, Event]]) -> None:
        """Number the events of one step, (request id, event), and queue them. Returns at once."""
        with self._wake:
            for request_id, event in new_events:
                outgoing = self._open.get(request_id)
                if outgoing is None:
                    continue
                seq = outgoing.next_seq
                # a call for each token of a large batch would delay the engine
                if seq < 2 or type(event) is not Delta or event.finish_reason is not None:
                    outgoing.observe(event)
                self._pending.append(Envelope(request_id, seq, event))
                outgoing.next_seq = seq + 1
            self._wake.notify()

    def redirect(self, request_id: str, web_id: str) -> None:
        """Publish the further events of a request for another web process; "" for none, which only the list
        gets."""
        with self._lock:
            if outgoing := self._open.get(request_id):
                outgoing.web_id = web_id

    def stop(self, timeout_s: float) -> None:
        """End the thread after it has written what is pending; wait for that up to `timeout_s`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.join(timeout_s)

    def run(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._stopping:
                    self._wake.wait()
                batch, self._pending = self._pending, []
                if not batch and self._stopping:
                    return
            self._deliver(batch)

    def _deliver(self, batch: list[Envelope]) -> None:
        """Write a batch, repeating it until it succeeds or is given up. Later events wait meanwhile."""
        give_up_at = time.monotonic() + RESEND_S
        while True:
            try:
                # prepared envelopes replace the others, so that a repeated write doesn't store an image twice
                for place, envelope in enumerate(batch):
                    event = self._prepare(envelope.event)
                    if event is not envelope.event:
                        batch[place] = Envelope(envelope.request_id, envelope.seq, event)
                lost = self._write(batch)
                break
            except Exception as error:
                # not only errors of Redis: without this thread no request of the worker would ever end
                if not isinstance(error, RedisError):
                    log.exception("writing events failed")
                with self._lock:
                    overfull = len(self._pending) > PENDING_LIMIT
                # a command that the ACL forbids will not be allowed the next time
                forbidden = isinstance(error, NoPermissionError)
                if forbidden or overfull or self._stopping or time.monotonic() > give_up_at:
                    log.error("events of %d requests could not be delivered: %s", len(_ids(batch)), error)
                    lost = _ids(batch)
                    break
                time.sleep(RETRY_PAUSE_S)
        self._end_requests(batch, lost)

    def _write(self, batch: list[Envelope]) -> set[str]:
        """Write a batch in one script call; returns the requests whose replay list Redis has lost."""
        by_request: dict[str, list[bytes]] = defaultdict(list)
        by_web: dict[str, list[bytes]] = defaultdict(list)
        published: dict[str, int] = defaultdict(int)
        with self._lock:
            outgoing = {
                request_id: self._open[request_id] for request_id in _ids(batch) if request_id in self._open
            }
        for envelope in batch:
            if stream := outgoing.get(envelope.request_id):
                data = events.encode(envelope)
                by_request[envelope.request_id].append(data)
                size = published[stream.web_id] + len(data)
                if stream.web_id and (len(data) <= SMALL_EVENT or size <= MESSAGE_LIMIT):
                    published[stream.web_id] = size
                    by_web[stream.web_id].append(data)
        if not by_request:
            return set()
        arguments: list[Any] = [len(by_web)]
        for web_id, entries in by_web.items():
            arguments += [self._keys.channel(web_id), b"[" + b",".join(entries) + b"]"]
        for request_id, entries in by_request.items():
            stream = outgoing[request_id]
            arguments += [0 if stream.written else stream.ttl_s, len(entries), *entries]
        lengths = self._write_script(
            keys=[self._keys.replay(request_id) for request_id in by_request], args=arguments
        )
        for request_id in by_request:
            outgoing[request_id].written = True
        return {request_id for request_id, length in zip(by_request, lengths, strict=True) if length == 0}

    def _end_requests(self, batch: Iterable[Envelope], lost: set[str]) -> None:
        """Close the requests whose terminal event was written, and those in `lost`."""
        ended: dict[str, Event | None] = dict.fromkeys(lost)
        for envelope in batch:
            if events.is_terminal(envelope.event) and envelope.request_id not in lost:
                ended[envelope.request_id] = envelope.event
        for request_id, event in ended.items():
            with self._lock:
                outgoing = self._open.pop(request_id, None)
            if outgoing is not None:
                outgoing.on_end(event)


def _ids(batch: Iterable[Envelope]) -> set[str]:
    return {envelope.request_id for envelope in batch}
