"""The worker's half of the event stream: one thread that writes what all requests gained in one call of a script.

Each event goes to the request's replay list and, with everything else of that step, in one message to the web process
that waits. Writing is idempotent: readers order by sequence number and drop doubles, so a write whose fate is unknown
is simply repeated, for at most `RESEND_S`; then its requests are given up.
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
from protocol.events import Envelope, Event
from protocol.names import Keys

log = logging.getLogger(__name__)

RESEND_S = 10.0
RETRY_PAUSE_S = 0.25
PENDING_LIMIT = 20_000
"""Envelopes waiting for a Redis that doesn't answer; beyond it requests are given up before memory is."""

# KEYS: the replay lists of the requests that gained something. ARGV: number of channels, then for each its name and its
# message; then for each list its TTL in seconds, the number of its new entries, and these. Returns the lists' lengths.
# One command: a pipeline of one for each request costs the worker ten times as much, while its engine waits for the lock
# of the interpreter.
_STEP = """
local at = 1
local function take()
  at = at + 1
  return ARGV[at - 1]
end
for _ = 1, take() do redis.call('PUBLISH', take(), take()) end
local lengths = {}
for place, list in ipairs(KEYS) do
  local ttl, length = tonumber(take()), 0
  -- TTL 0: only onto a list that exists, since one made anew would have no TTL and no beginning
  local push = ttl > 0 and 'RPUSH' or 'RPUSHX'
  for _ = 1, take() do length = redis.call(push, list, take()) end
  if ttl > 0 then redis.call('EXPIRE', list, ttl) end
  lengths[place] = length
end
return lengths
"""


OnEnd = Callable[[Event | None], None]
"""Called once for each request, in the sender's thread: with the terminal event that was written, or with None when the
request's events can't be delivered."""


class _Outgoing:
    """One open request on its way out."""

    __slots__ = ("next_seq", "on_end", "ttl_s", "web_id", "written")

    def __init__(self, web_id: str, ttl_s: int, on_end: OnEnd) -> None:
        self.web_id = web_id
        self.ttl_s = ttl_s
        self.on_end = on_end
        self.next_seq = 0
        self.written = False


class EventSender(threading.Thread):
    """Owns the numbering of events. `emit` never blocks on Redis; everything else happens in this thread.

    `prepare` may turn an event into the one that travels (a picture's bytes into its name in the store); it runs in
    this thread and may raise RedisError.
    """

    def __init__(self, client: RedisClient, keys: Keys, *, prepare: Callable[[Event], Event]) -> None:
        super().__init__(name="event-sender", daemon=True)
        self._step = client.register_script(_STEP)
        self._keys = keys
        self._prepare = prepare
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._open: dict[str, _Outgoing] = {}
        self._pending: list[Envelope] = []
        self._stopping = False

    def open(self, request_id: str, web_id: str, ttl_s: int, on_end: OnEnd) -> None:
        """Begin a request's stream; events of unknown requests are dropped."""
        with self._lock:
            self._open[request_id] = _Outgoing(web_id, ttl_s, on_end)

    def emit(self, gained: Sequence[tuple[str, Event]]) -> None:
        """Number and hand over what requests gained in one step. Returns at once."""
        with self._wake:
            for request_id, event in gained:
                outgoing = self._open.get(request_id)
                if outgoing is None:
                    continue
                self._pending.append(Envelope(request_id, outgoing.next_seq, event))
                outgoing.next_seq += 1
            self._wake.notify()

    def stop(self, timeout_s: float) -> None:
        """Write what is pending and end the thread."""
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
        """Write a batch, again and again until it is written or too old; later events wait behind it, in order."""
        give_up_at = time.monotonic() + RESEND_S
        while True:
            try:
                # prepared envelopes replace the raw ones, so that a repeat doesn't store a picture twice
                for place, envelope in enumerate(batch):
                    event = self._prepare(envelope.event)
                    if event is not envelope.event:
                        batch[place] = Envelope(envelope.request_id, envelope.seq, event)
                gone = self._write(batch)
                break
            except Exception as error:
                # any exception, not Redis' alone: without this thread no request of the worker would ever end
                if not isinstance(error, RedisError):
                    log.exception("writing events failed")
                with self._lock:
                    overfull = len(self._pending) > PENDING_LIMIT
                # an ACL that forbids the command forbids it the next time, too
                forbidden = isinstance(error, NoPermissionError)
                if forbidden or overfull or self._stopping or time.monotonic() > give_up_at:
                    log.error("events of %d requests could not be delivered: %s", len(_ids(batch)), error)
                    gone = _ids(batch)
                    break
                time.sleep(RETRY_PAUSE_S)
        self._settle(batch, gone)

    def _write(self, batch: list[Envelope]) -> set[str]:
        """One script call for the whole batch; returns requests whose replay list has vanished (Redis lost its data)."""
        by_request: dict[str, list[bytes]] = defaultdict(list)
        by_web: dict[str, list[bytes]] = defaultdict(list)
        with self._lock:
            outgoing = {
                request_id: self._open[request_id] for request_id in _ids(batch) if request_id in self._open
            }
        for envelope in batch:
            if stream := outgoing.get(envelope.request_id):
                data = events.encode(envelope)
                by_request[envelope.request_id].append(data)
                by_web[stream.web_id].append(data)
        if not by_request:
            return set()
        arguments: list[Any] = [len(by_web)]
        for web_id, entries in by_web.items():
            arguments += [self._keys.channel(web_id), b"[" + b",".join(entries) + b"]"]
        for request_id, entries in by_request.items():
            stream = outgoing[request_id]
            arguments += [0 if stream.written else stream.ttl_s, len(entries), *entries]
        lengths = self._step(
            keys=[self._keys.replay(request_id) for request_id in by_request], args=arguments
        )
        for request_id in by_request:
            outgoing[request_id].written = True
        return {request_id for request_id, length in zip(by_request, lengths, strict=True) if length == 0}

    def _settle(self, batch: Iterable[Envelope], gone: set[str]) -> None:
        ended: dict[str, Event | None] = dict.fromkeys(gone)
        for envelope in batch:
            if events.is_terminal(envelope.event) and envelope.request_id not in gone:
                ended[envelope.request_id] = envelope.event
        for request_id, event in ended.items():
            with self._lock:
                outgoing = self._open.pop(request_id, None)
            if outgoing is not None:
                outgoing.on_end(event)


def _ids(batch: Iterable[Envelope]) -> set[str]:
    return {envelope.request_id for envelope in batch}
