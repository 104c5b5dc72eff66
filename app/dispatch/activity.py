"""What all web processes did in the last minutes: their requests that ended, and how long queues and first
tokens took.

Each process notes its requests in memory and writes them every second, all in one script call. Samples of
SAMPLE_S seconds count the times to the first token of all processes in classes, so that any quantile can be
told from them; a list of requests would either be too short under load or too long to read every second. No
entry has a prompt.
"""

import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.connections import RedisClient
from protocol.names import Keys

SAMPLE_S = 5
KEPT_S = 900
"""For how long samples are kept."""
REQUESTS_KEPT = 500
REQUESTS_KEPT_S = 24 * 3600
REQUESTS_READ = 100
"""The most requests that one `read` returns, the newest."""
GROWTH = 1.2
"""From the upper bound of one class of times to the next."""
_UNWRITTEN = 1000
CURSOR = r"([0-9]{1,12})\.([0-9]{1,15}-[0-9]{1,15})"
"""A sample's time and an entry's id in the stream."""
FROM_THE_START = "0.0-0"


class EndedRequest(msgspec.Struct, kw_only=True):
    """A request whose job was valid, when its response has ended. Milliseconds count from the validation.

    `outcome`: "completed" or the code of an error; `status`: HTTP's, which a stream has sent before it can
    fail. What is None was not reached or does not apply.
    """

    id: str
    model: str
    route: str
    status: int
    outcome: str
    cid: str | None = None
    queued_ms: int | None = None
    first_token_ms: int | None = None
    total_ms: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    images: int | None = None
    ended_at: float = 0.0
    """Redis time, seconds. While the entry waits to be written: time.monotonic()."""


class Queue(NamedTuple):
    """How many requests of a model wait for a worker, and how many workers have claimed."""

    model: str
    waiting: int
    running: int


class Sample(msgspec.Struct):
    """SAMPLE_S seconds from `at` (Redis time). `models`: what is known of each."""

    at: int
    models: dict[str, "ModelSample"] = {}


class ModelSample(msgspec.Struct):
    """The largest numbers of requests that waited and ran, and how many first tokens came in which time.

    `first_token_ms`: requests by the upper bound of their class in milliseconds, above its lower one, which
    is the bound divided by GROWTH.
    """

    waiting: int = 0
    running: int = 0
    first_token_ms: dict[int, int] = {}


class ActivityRead(NamedTuple):
    """What `read` found.

    `cursor`: for the next call, which then finds only what is new or may have changed.
    """

    now: float
    cursor: str
    queues: list[Queue]
    samples: list[Sample]
    requests: list[EndedRequest]


# Counts the first tokens of some requests, samples the queues and adds the requests to the stream.
# The samples' keys are built here, which Redis allows everywhere but in a cluster.
_WRITE = """
local requests_key = KEYS[1]
local sample_prefix, sample_s, kept_s = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local max_requests, requests_kept_s = ARGV[4], ARGV[5]
local batch = cjson.decode(ARGV[6])

local now = tonumber(redis.call('TIME')[1])
local key = sample_prefix .. (now - now % sample_s)
local function keep_largest(field, value)
  if value > tonumber(redis.call('HGET', key, field) or -1) then redis.call('HSET', key, field, value) end
end
for i, model in ipairs(batch.models) do
  keep_largest('waiting ' .. model, redis.call('ZCOUNT', KEYS[2 * i], now, '+inf'))
  keep_largest('running ' .. model, redis.call('ZCOUNT', KEYS[2 * i + 1], now, '+inf'))
end
for field, count in pairs(batch.first) do redis.call('HINCRBY', key, field, count) end
redis.call('EXPIRE', key, kept_s)
for _, entry in ipairs(batch.ended) do
  redis.call('XADD', requests_key, 'MAXLEN', '~', max_requests, '*', 'late_s', entry[1], 'body', entry[2])
end
if #batch.ended > 0 then redis.call('EXPIRE', requests_key, requests_kept_s) end
"""

# Returns the time, the queues as they are, the samples from one time on, and the newest requests after an id.
_READ = """
local requests_key = KEYS[1]
local sample_prefix, sample_s, kept_s = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local since, after, count = tonumber(ARGV[4]), ARGV[5], ARGV[6]

local time = redis.call('TIME')
local now = tonumber(time[1])
local queues = {}
for i = 2, #KEYS do table.insert(queues, redis.call('ZCOUNT', KEYS[i], now, '+inf')) end
local samples = {}
local newest = now - now % sample_s
for at = math.max(since, newest - kept_s + sample_s), newest, sample_s do
  local fields = redis.call('HGETALL', sample_prefix .. at)
  if #fields > 0 then table.insert(samples, {at, fields}) end
end
local requests = redis.call('XREVRANGE', requests_key, '+', '(' .. after, 'COUNT', count)
return {time, queues, samples, requests}
"""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(EndedRequest)


class Activity:
    """Notes, writes and reads the activity.

    `write` and `read` take one round trip and raise redis.RedisError.
    """

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        models: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._clock = clock
        self._sample_prefix = keys.sample("")
        self._keys = [keys.ended_requests]
        for model in models:
            self._keys += [keys.waiting(model), keys.running(model)]
        self._noted: deque[EndedRequest] = deque(maxlen=_UNWRITTEN)
        self._unwritten: list[EndedRequest] = []
        self._write = client.register_script(_WRITE)
        self._read = client.register_script(_READ)

    def note(self, request: EndedRequest) -> None:
        """Note a request that has just ended; `write` writes it."""
        request.ended_at = self._clock()
        self._noted.append(request)

    def write(self) -> None:
        """Write what was noted, and sample the queues. What can't be written is kept for the next call."""
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        self._unwritten = (self._unwritten + noted)[-_UNWRITTEN:]
        now = self._clock()
        batch = {
            "models": self._models,
            "first": _classes(self._unwritten),
            "ended": [
                (f"{now - request.ended_at:.3f}", _encoder.encode(request).decode())
                for request in self._unwritten
            ],
        }
        limits = [SAMPLE_S, KEPT_S, REQUESTS_KEPT, REQUESTS_KEPT_S]
        self._write(keys=self._keys, args=[self._sample_prefix, *limits, _encoder.encode(batch)])
        self._unwritten = []

    def read(self, cursor: str = FROM_THE_START) -> ActivityRead:
        """Read what is new since `cursor`, and the last sample that it knows, which may have changed.

        Raises ValueError for a cursor that is none.
        """
        found = re.fullmatch(CURSOR, cursor)
        if found is None:
            raise ValueError(cursor)
        since, after = int(found[1]), found[2]
        args = [self._sample_prefix, SAMPLE_S, KEPT_S, since - since % SAMPLE_S, after, REQUESTS_READ]
        (seconds, micros), counts, samples, entries = self._read(keys=self._keys, args=args)
        now = int(seconds) + int(micros) / 1e6
        last = entries[0][0].decode() if entries else after
        return ActivityRead(
            now=now,
            cursor=f"{int(now - now % SAMPLE_S)}.{last}",
            queues=[
                Queue(model, waiting, running)
                for model, waiting, running in zip(self._models, counts[::2], counts[1::2], strict=True)
            ],
            samples=[_sample(int(at), fields) for at, fields in samples],
            requests=list(_requests(entries)),
        )


def upper_bound_ms(ms: float) -> int:
    """Return the upper bound of the class of times that `ms` belongs to."""
    return round(GROWTH ** max(0, math.ceil(math.log(max(ms, 1)) / math.log(GROWTH) - 1e-9)))


def _classes(requests: Iterable[EndedRequest]) -> dict[str, int]:
    """Return the fields of a sample that count the first tokens of these requests."""
    return Counter(
        f"{upper_bound_ms(request.first_token_ms)} {request.model}"
        for request in requests
        if request.first_token_ms is not None
    )


def _sample(at: int, flat: list[bytes]) -> Sample:
    sample = Sample(at)
    for field, value in zip(flat[::2], flat[1::2], strict=True):
        kind, _, model = field.decode().partition(" ")
        known = sample.models.setdefault(model, ModelSample())
        if kind.isdigit():
            known.first_token_ms[int(kind)] = int(value)
        elif kind in ("waiting", "running"):
            setattr(known, kind, int(value))
    return sample


def _requests(entries: list[Any]) -> Iterable[EndedRequest]:
    """Yield the requests, the newest first.

    Entries of another version that this one can't read are left out.
    """
    for entry_id, (_, late_s, _, body) in entries:
        try:
            request = _decoder.decode(body)
        except msgspec.MsgspecError:
            continue
        request.ended_at = int(entry_id.partition(b"-")[0]) / 1000 - float(late_s)
        yield request
