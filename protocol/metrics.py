"""Metrics that processes share through Redis, so that each web process can show those of the whole
deployment.

A process keeps counters and histograms for itself and writes them, as they stand, with its lease. Nothing is
ever added up in Redis: a write may be repeated, and a process that is restarted begins at 0, which Prometheus
expects of counters.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from protocol.connections import RedisClient
from protocol.names import Keys
from protocol.versions import log_once

log = logging.getLogger(__name__)

GPU_SECONDS = "gpu_seconds_total"
"""Counter of workers, by `outcome`."""
RUNNING_GPU_SECONDS = "gpu_seconds_running"
"""Gauge of workers: what their running requests have used so far. Of a lost worker it counts as lost."""
METRICS_TTL_S = 900
"""For how long the metrics of a process outlive it: a scrape must still find what was counted last."""


class Family(msgspec.Struct, array_like=True):
    """A metric with all its samples: (name, labels, value)."""

    name: str
    help: str
    type: str
    samples: list[tuple[str, dict[str, str], float]]


class Snapshot(msgspec.Struct, kw_only=True):
    """The metrics of one process. `labels` belong to each of its samples.

    `web_id`: of a web process, "" for a worker. `incarnation_id`: of a worker, "" for a web process.
    """

    labels: dict[str, str]
    families: list[Family]
    web_id: str = ""
    incarnation_id: str = ""

    def value(self, name: str, **labels: str) -> float:
        """Return the value of one sample, 0 if there is none."""
        found = (sample for family in self.families for sample in family.samples)
        return next((value for key, given, value in found if key == name and given == labels), 0.0)


def families_of(registry: CollectorRegistry) -> list[Family]:
    """Return what a registry has collected, without the times at which its metrics were created."""
    found = []
    for metric in registry.collect():
        samples = [
            (sample.name, sample.labels, sample.value)
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]
        found.append(Family(metric.name, metric.documentation, metric.type, samples))
        give_way()
    return found


def give_way() -> None:
    """Let streams go on: the histograms of many models take milliseconds."""
    time.sleep(0)


def merged(snapshots: Iterable[Snapshot]) -> list[Metric]:
    """Return the metrics of all processes, each with the labels of its process.

    The first one's help is taken.
    """
    found: dict[str, Metric] = {}
    for snapshot in snapshots:
        for family in snapshot.families:
            metric = found.setdefault(family.name, Metric(family.name, family.help, family.type))
            for name, labels, value in family.samples:
                metric.add_sample(name, labels | snapshot.labels, value)
    return list(found.values())


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Snapshot)


class MetricStore:
    """The snapshots of all processes in Redis. Methods raise redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    def write(self, process: str, snapshot: Snapshot) -> None:
        """Replace the snapshot of a process (its web id or cid)."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._keys.metrics_of(process), _encode(snapshot), ex=METRICS_TTL_S)
            pipe.sadd(self._keys.metrics, process)
            pipe.expire(self._keys.metrics, METRICS_TTL_S)
            pipe.execute()

    def read(self, process: str) -> Snapshot | None:
        """Return the snapshot of one process; None if there is none that this version can read."""
        body: Any = self._redis.get(self._keys.metrics_of(process))
        return _readable(body) if body else None

    def read_all(self) -> list[Snapshot]:
        """Return all snapshots, ordered by process. Forgets processes whose snapshot has expired."""
        members: Any = self._redis.smembers(self._keys.metrics)
        processes = sorted(member.decode() for member in members)
        if not processes:
            return []
        bodies: Any = self._redis.mget([self._keys.metrics_of(process) for process in processes])
        found = dict(zip(processes, bodies, strict=True))
        if expired := [process for process, body in found.items() if body is None]:
            # a process that is still alive adds itself again with its next lease
            self._redis.srem(self._keys.metrics, *expired)
        snapshots = [_readable(body) for body in found.values() if body is not None]
        return [snapshot for snapshot in snapshots if snapshot is not None]


def _readable(body: bytes) -> Snapshot | None:
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        log_once(log, "the metrics of another version are not shown: %s", error)
        return None
