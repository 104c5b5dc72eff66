"""The streams that their clients may resume: who reads each, and what is needed to continue it anywhere.

A record exists from the first token of such a stream on. Its reader is one connection of one web process.
When that is lost, the record and the request's replay list are kept for the grace period, so that another
reader can take over; a worker cancels a request whose record has expired (workers/stream_readers.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from protocol.connections import RedisClient, queue_errors
from protocol.events import Envelope, decode_readable
from protocol.names import Keys

REPLAY_LONGER_S = 10
"""How much longer than the record the replay list is kept, so that the worker sees the end of the record
first."""

_BEGIN = """
local stream_key = KEYS[1]
local reader, owner, grace_s, elapsed_s, body, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local time = redis.call('TIME')
local began = tonumber(time[1]) + tonumber(time[2]) / 1e6 - elapsed_s
redis.call('HSET', stream_key, 'reader', reader, 'owner', owner, 'grace_s', grace_s, 'body', body,
  'began', string.format('%.6f', began))
redis.call('EXPIRE', stream_key, ttl)
"""

# Returns {} unless the owner is the same, else {record, seconds since its begin, the reader before, the
# replay list}.
_TAKE_OVER = """
local stream_key, replay_list = KEYS[1], KEYS[2]
local reader, owner, ttl = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', stream_key, 'owner') ~= owner then return {} end
local before = redis.call('HGET', stream_key, 'reader')
redis.call('HSET', stream_key, 'reader', reader)
-- a finished one needs no more time: its whole list is returned
if redis.call('HEXISTS', stream_key, 'finished') == 0 then
  redis.call('EXPIRE', stream_key, ttl)
  redis.call('EXPIRE', replay_list, ttl)
end
local time = redis.call('TIME')
local elapsed = tonumber(time[1]) + tonumber(time[2]) / 1e6 - tonumber(redis.call('HGET', stream_key, 'began'))
return {redis.call('HGET', stream_key, 'body'), tostring(elapsed), before, redis.call('LRANGE', replay_list, 0, -1)}
"""

# Does nothing for a reader that another one has replaced.
_LEAVE = """
local stream_key, replay_list = KEYS[1], KEYS[2]
local reader, finished, replay_longer_s = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', stream_key, 'reader') ~= reader then return end
redis.call('HSET', stream_key, 'reader', '')
-- the first end counts, so that reading a finished one again and again does not keep it
if redis.call('HEXISTS', stream_key, 'finished') == 1 then return end
if finished == '1' then redis.call('HSET', stream_key, 'finished', 1) end
local grace_s = redis.call('HGET', stream_key, 'grace_s')
redis.call('EXPIRE', stream_key, grace_s)
redis.call('EXPIRE', replay_list, grace_s + replay_longer_s)
"""


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What all chunks of a stream have in common, and the times of its request, in seconds from its
    validation."""

    model: str
    n: int
    include_usage: bool
    created: int
    deadline_s: float
    queued_s: float | None
    first_token_s: float | None


class Takeover(NamedTuple):
    """A stream that now has another reader. `elapsed_s`: since its request was validated.

    `reader_before`: "" if the stream had none. `envelopes`: all events so far, by number, perhaps with
    duplicates.
    """

    record: StreamRecord
    elapsed_s: float
    reader_before: str
    envelopes: list[Envelope]


def reader_name(web_id: str, connection: str) -> str:
    """Return the name of a reader: one connection of a web process."""
    return f"{web_id}:{connection}"


def web_of(reader: str) -> str:
    """Return the id of a reader's web process; "" for no reader."""
    return reader.partition(":")[0]


class ResumableStreams:
    """The records in Redis. Each method takes one round trip.

    `ttl_s`: how long a record with a reader is kept, longer than every deadline.
    """

    def __init__(self, client: RedisClient, keys: Keys, *, ttl_s: int) -> None:
        self._redis = client
        self._keys = keys
        self._ttl_s = ttl_s
        self._begin = client.register_script(_BEGIN)
        self._take_over = client.register_script(_TAKE_OVER)
        self._leave = client.register_script(_LEAVE)

    def begin(
        self,
        request_id: str,
        record: StreamRecord,
        *,
        reader: str,
        owner: str,
        grace_s: int,
        elapsed_s: float,
    ) -> None:
        """Make the record of a stream that is about to be sent. `owner`: who may resume it.

        `elapsed_s`: since its request was validated. Raises QueueUnavailable.
        """
        body = msgspec.json.encode(record)
        with queue_errors():
            self._begin(
                keys=[self._keys.stream(request_id)],
                args=[reader, owner, grace_s, elapsed_s, body, self._ttl_s],
            )

    def take_over(self, request_id: str, *, reader: str, owner: str) -> Takeover | None:
        """Make `reader` the reader of a stream. None for a stream that is not known, or is another owner's.

        Raises QueueUnavailable, and msgspec.MsgspecError for the record of a version that this one can't
        read.
        """
        with queue_errors():
            answer = self._take_over(keys=self._keys_of(request_id), args=[reader, owner, self._ttl_s])
        if not answer:
            return None
        body, elapsed, before, entries = answer
        envelopes = sorted(decode_readable(entries), key=lambda envelope: envelope.seq)
        record = msgspec.json.decode(body, type=StreamRecord)
        return Takeover(record, float(elapsed), before.decode(), envelopes)

    def leave(self, request_id: str, reader: str, *, finished: bool) -> None:
        """Note that `reader` is gone, and whether it has read the end: the grace period begins, or does so
        again.

        Raises redis.RedisError.
        """
        self._leave(keys=self._keys_of(request_id), args=[reader, int(finished), REPLAY_LONGER_S])

    def readers(self, request_ids: Sequence[str]) -> list[str | None]:
        """Return the reader of each, "" if it has none at the moment, None without a record.

        Raises redis.RedisError.
        """
        with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hget(self._keys.stream(request_id), "reader")
            return [None if reader is None else reader.decode() for reader in pipe.execute()]

    def _keys_of(self, request_id: str) -> list[str]:
        return [self._keys.stream(request_id), self._keys.replay(request_id)]
