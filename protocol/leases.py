"""Who lives: leases of workers and web processes in Redis, and the one place that judges them.

A worker's record outlives its lease, so that a worker which died without a word still shows, as `lost`, until the
reconciler has taken it off the node. An incarnation is cid + incarnation_id: a restarted worker has the same cid, a new incarnation_id.
"""

from typing import Any, Literal

import msgspec

from protocol.connections import RedisClient
from protocol.names import Keys

LEASE_TTL_S = 10
REFRESH_S = 3
RECORD_TTL_S = 24 * 3600

WorkerState = Literal["loading", "ready", "draining", "lost"]


class WorkerRecord(msgspec.Struct, kw_only=True):
    """What a worker says of itself with every refresh; `/v1/workers` shows most of it.

    `node`: the node it registers with, as its NODE_URL ("" for none); with `service_id` it names one node on one
    machine. `registered`: the node has said yes and was not told otherwise since.
    """

    cid: str
    incarnation_id: str
    model: str
    tasks: tuple[str, ...]
    project: str
    pid: int
    host: str
    service_id: str
    node: str
    gpus: list[str]
    state: WorkerState = "loading"
    running: int = 0
    registered: bool = False
    last_error: str = ""
    steps: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(WorkerRecord)


class Leases:
    """Writes and reads leases. Every method is one round trip and raises redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    def renew_worker(self, record: WorkerRecord) -> str:
        """Say that this worker lives; returns the incarnation_id that held the lease before ("" for none).

        A worker that meets another incarnation_id than its own there shares its cid with a newer incarnation.
        """
        keys = self._keys
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.lease(record.cid), record.incarnation_id, ex=LEASE_TTL_S, get=True)
            pipe.set(keys.worker(record.cid), _encoder.encode(record), ex=RECORD_TTL_S)
            pipe.sadd(keys.workers, record.cid)
            before = pipe.execute()[0]
        return before.decode() if before else ""

    def release_worker(self, record: WorkerRecord, *, keep_record: bool) -> None:
        """End a lease. `keep_record` leaves a `lost` worker behind for the reconciler: it is still on the node."""
        keys = self._keys
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.lease(record.cid))
            if keep_record:
                pipe.set(keys.worker(record.cid), _encoder.encode(record), ex=RECORD_TTL_S)
            else:
                pipe.delete(keys.worker(record.cid))
                pipe.srem(keys.workers, record.cid)
            pipe.execute()

    def forget_worker(self, cid: str) -> None:
        """Drop the record of a lost worker, once the node has been told."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.worker(cid))
            pipe.srem(self._keys.workers, cid)
            pipe.execute()

    def workers(self) -> list[WorkerRecord]:
        """All workers known, ordered by model and cid. `lost`: the lease has lapsed."""
        members: Any = self._redis.smembers(self._keys.workers)
        cids = sorted(cid.decode() for cid in members)
        if not cids:
            return []
        found: Any = self._redis.mget(
            [self._keys.worker(cid) for cid in cids] + [self._keys.lease(cid) for cid in cids]
        )
        records = []
        for body, incarnation_id in zip(found[: len(cids)], found[len(cids) :], strict=True):
            if body is None:
                continue
            record = _decoder.decode(body)
            if incarnation_id is None or incarnation_id.decode() != record.incarnation_id:
                record.state = "lost"
            records.append(record)
        return sorted(records, key=lambda record: (record.model, record.cid))

    def renew_web(self, web_id: str) -> None:
        """Say that this web process lives."""
        self._redis.set(self._keys.web_lease(web_id), b"1", ex=LEASE_TTL_S)

    def release_web(self, web_id: str) -> None:
        self._redis.delete(self._keys.web_lease(web_id))

    def living_webs(self, web_ids: list[str]) -> set[str]:
        """Those of `web_ids` whose lease stands."""
        if not web_ids:
            return set()
        found = self._redis.mget([self._keys.web_lease(web_id) for web_id in web_ids])
        return {web_id for web_id, lease in zip(web_ids, found, strict=True) if lease is not None}
