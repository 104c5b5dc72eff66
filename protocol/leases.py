"""Leases of workers and web processes in Redis: how they are kept, and when a missing one counts.

A worker's record outlives its lease, so that a worker which was killed still shows, as `lost`, until the
reconciler has taken it off the node. A restarted worker has the same cid and a new incarnation id.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from protocol.connections import RedisClient
from protocol.names import Keys
from protocol.versions import PROTOCOL_VERSION, log_once

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
REFRESH_S = 3
"""Leases are renewed this often."""
GAP_S = LEASE_TTL_S - REFRESH_S
"""The longest pause between two looks that is no gap: each lease that is kept lasts at least so long."""
RECORD_TTL_S = 24 * 3600

WorkerState = Literal["loading", "ready", "draining", "drained", "lost"]
"""`draining`: the worker takes no more requests, and some run; `drained`: it waits until an operator resumes
it."""
UNREADABLE = "unknown"
"""Replaces the state of a worker that lives and whose record this version can't read. Of that only the cid is
known."""


class GpuUsage(msgspec.Struct, kw_only=True, frozen=True):
    """What the driver tells of a worker's GPU, for all processes that use it.

    `utilization`: the part of the last second or less in which a kernel ran, 0 to 1. The last two are None
    where the driver does not tell them, as for a slice of a GPU (MIG).
    """

    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None = None
    temperature_c: int | None = None


class WorkerRecord(msgspec.Struct, kw_only=True):
    """What a worker reports with every renewal of its lease; `/v1/workers` shows most of it.

    `node` is the NODE_URL that the worker registers with ("" for none); together with `service_id` it names
    one node on one machine. `registered`: the node has accepted the registration, and has not been told
    otherwise since.
    """

    cid: str
    incarnation_id: str
    name: str = ""
    """Celery's name of the process, `echo-1@host`, by which operators know it; "" in older versions."""
    model: str
    tasks: tuple[str, ...]
    project: str
    pid: int
    host: str
    service_id: str
    node: str
    gpus: list[str]
    state: WorkerState | str = "loading"
    """A newer version may have states that this one does not know."""
    running: int = 0
    registered: bool = False
    last_error: str = ""
    steps: int = 0
    slots: int = 0
    """Requests that the worker takes at the same time."""
    rate: float = 0.0
    """Work (protocol.jobs.work_of) finished in a second while every slot was busy and requests waited; 0:
    unknown."""
    max_model_len: int = 0
    """Tokens of prompt and answer together that the loaded model takes; 0: unknown, or not a chat model."""
    kv_cache_usage: float | None = None
    """The part of the KV cache that running chats hold, 0 to 1; None for engines without one."""
    gpu: GpuUsage | None = None
    """None on the CPU, and while the driver does not answer."""
    takes_images: bool = False
    """Whether the loaded chat model takes images in messages."""
    protocol: int = PROTOCOL_VERSION


class Observation:
    """For how long leases have been watched without a gap, and so whether a missing one counts.

    A missing lease is weak evidence: after Redis stalled or came back empty, or after this process was
    paused (and the whole machine perhaps with it), every lease is missing until its owner has renewed it.
    So any gap in observation restarts the waiting period. A gap is a failed look, or a pause of more than
    GAP_S between two looks.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._seen_at = 0.0

    def seen(self) -> None:
        """Note that leases were read. Called after the read, so that a pause during it is a gap too."""
        now = self._clock()
        if self._since is None or now - self._seen_at > GAP_S:
            self._since = now
        self._seen_at = now

    def interrupt(self) -> None:
        """Restart the waiting period: a look has failed, or leases can be missing for another reason."""
        self._since = None

    @property
    def interrupted(self) -> bool:
        """Whether the last look failed. True before the first one."""
        return self._since is None

    @property
    def watched_s(self) -> float:
        """Seconds from the first look after the last gap to the latest look."""
        return 0.0 if self._since is None else self._seen_at - self._since

    def absence_counts(self, after_s: float = LEASE_TTL_S) -> bool:
        """Whether a lease that the latest look lacks is gone: watched for `after_s` without a gap."""
        return self.watched_s >= after_s


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(WorkerRecord)


# Holds a worker's lease and writes its record. Writes nothing while another incarnation has the lease, unless
# it is to be seized. Returns the incarnation id that the lease had before, nil without one.
_HOLD = """
local lease_key, record_key, workers_key = KEYS[1], KEYS[2], KEYS[3]
local incarnation_id, record, cid, seize = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local lease_ttl, record_ttl = ARGV[5], ARGV[6]

local holder = redis.call('GET', lease_key)
if holder and holder ~= incarnation_id and not seize then return holder end
redis.call('SET', lease_key, incarnation_id, 'EX', lease_ttl)
redis.call('SET', record_key, record, 'EX', record_ttl)
redis.call('SADD', workers_key, cid)
return holder
"""

# Ends a worker's lease, unless another incarnation has it. Keeps this record, or deletes it if it is empty.
_RELEASE = """
local lease_key, record_key, workers_key = KEYS[1], KEYS[2], KEYS[3]
local incarnation_id, record, cid, record_ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local holder = redis.call('GET', lease_key)
if holder and holder ~= incarnation_id then return end
redis.call('DEL', lease_key)
if record ~= '' then
  redis.call('SET', record_key, record, 'EX', record_ttl)
else
  redis.call('DEL', record_key)
  redis.call('SREM', workers_key, cid)
end
"""


class Leases:
    """Writes and reads leases. Every method takes a round trip or two, and raises redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._redis = client
        self._keys = keys
        self._hold_script = client.register_script(_HOLD)
        self._release_script = client.register_script(_RELEASE)

    def seize_worker(self, record: WorkerRecord) -> str:
        """Take a worker's lease, from an older incarnation too, and write its record; returns as
        `renew_worker` does."""
        return self._hold(record, seize=True)

    def renew_worker(self, record: WorkerRecord) -> str:
        """Renew a worker's lease and record; returns the incarnation id that the lease had before, or "".

        Another id than the record's own means that another incarnation has the lease: then nothing was
        written.
        """
        return self._hold(record, seize=False)

    def _hold(self, record: WorkerRecord, *, seize: bool) -> str:
        times = (LEASE_TTL_S, RECORD_TTL_S)
        before = self._hold_script(
            keys=self._worker_keys(record.cid),
            args=[record.incarnation_id, _encoder.encode(record), record.cid, int(seize), *times],
        )
        return before.decode() if before else ""

    def release_worker(self, record: WorkerRecord, *, keep_record: bool) -> None:
        """End a lease, unless another incarnation has it.

        `keep_record`: it shows as `lost` until the reconciler has taken it off the node.
        """
        body = _encoder.encode(record) if keep_record else b""
        self._release_script(
            keys=self._worker_keys(record.cid), args=[record.incarnation_id, body, record.cid, RECORD_TTL_S]
        )

    def _worker_keys(self, cid: str) -> list[str]:
        return [self._keys.lease(cid), self._keys.worker(cid), self._keys.workers]

    def forget_worker(self, cid: str) -> None:
        """Delete the record of a lost worker, after it was taken off the node."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.worker(cid))
            pipe.srem(self._keys.workers, cid)
            pipe.execute()

    def workers(self) -> list[WorkerRecord]:
        """Return all records, ordered by model and cid. Without a lease the state is `lost`."""
        members: Any = self._redis.smembers(self._keys.workers)
        cids = sorted(cid.decode() for cid in members)
        if not cids:
            return []
        found: Any = self._redis.mget(
            [self._keys.worker(cid) for cid in cids] + [self._keys.lease(cid) for cid in cids]
        )
        records = []
        for cid, body, incarnation_id in zip(cids, found[: len(cids)], found[len(cids) :], strict=True):
            if body is None:
                continue
            record = _readable(cid, body, incarnation_id)
            if incarnation_id is None or incarnation_id.decode() != record.incarnation_id:
                record.state = "lost"
            records.append(record)
        return sorted(records, key=lambda record: (record.model, record.cid))

    def renew_web(self, web_id: str) -> None:
        """Renew the lease of a web process."""
        self._redis.set(self._keys.web_lease(web_id), b"1", ex=LEASE_TTL_S)

    def release_web(self, web_id: str) -> None:
        self._redis.delete(self._keys.web_lease(web_id))

    def living_webs(self, web_ids: list[str]) -> set[str]:
        """Return those of `web_ids` that have a lease."""
        if not web_ids:
            return set()
        found = self._redis.mget([self._keys.web_lease(web_id) for web_id in web_ids])
        return {web_id for web_id, lease in zip(web_ids, found, strict=True) if lease is not None}


def _readable(cid: str, body: bytes, incarnation_id: bytes | None) -> WorkerRecord:
    """The record, or one that only says that this worker exists, for a record that this version can't read.

    It must not hide the others, nor look as if its worker were gone.
    """
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        log_once(log, "the record of worker %s is of another version: %s", cid, error)
        return WorkerRecord(
            cid=cid,
            incarnation_id=incarnation_id.decode() if incarnation_id else "",
            model="",
            tasks=(),
            project="",
            pid=0,
            host="",
            service_id="",
            node="",
            gpus=[],
            state=UNREADABLE,
        )
