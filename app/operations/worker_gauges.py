"""Gauges of the workers, from the records that they renew with their leases."""

from collections import Counter
from collections.abc import Callable, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from node.registration import has_node_type
from protocol.leases import GpuUsage, WorkerRecord

GAUGES: tuple[tuple[str, str, Callable[[WorkerRecord], float | None]], ...] = (
    ("num_requests_running", "Requests that the worker has claimed and not ended.", lambda w: w.running),
    ("engine_slots", "Requests that the worker takes at the same time.", lambda w: w.slots),
    ("kv_cache_usage_perc", "Part of the KV cache in use. 1 means all of it.", lambda w: w.kv_cache_usage),
    (
        "node_registered",
        "Whether the node has accepted the worker's registration. Only where there is a node that knows its task.",
        lambda w: float(w.registered) if w.node and has_node_type(w.tasks) else None,
    ),
)
"""Name, help and value of each gauge; without a value there is no sample."""

GPU_GAUGES: tuple[tuple[str, str, Callable[[GpuUsage], float | None]], ...] = (
    (
        "gpu_memory_used_bytes",
        "Memory of the worker's GPU in use by all processes.",
        lambda g: g.memory_used_bytes,
    ),
    ("gpu_memory_total_bytes", "Memory of the worker's GPU.", lambda g: g.memory_total_bytes),
    (
        "gpu_utilization",
        "Part of the time in which the worker's GPU ran a kernel, 0 to 1.",
        lambda g: g.utilization,
    ),
    ("gpu_temperature_celsius", "Temperature of the worker's GPU.", lambda g: g.temperature_c),
)


def worker_gauges(records: Sequence[WorkerRecord]) -> list[Metric]:
    """Return the gauges of the workers that live, and the number of all workers by model and state."""
    workers = GaugeMetricFamily("workers", "Workers by model and state.", labels=["model_name", "state"])
    for (model, state), count in Counter((each.model, each.state) for each in records).items():
        workers.add_metric([model, state], count)
    # a record that this version can't read has no model
    living = [record for record in records if record.state != "lost" and record.model]
    found: list[Metric] = [workers]
    for name, text, value in GAUGES:
        found.append(_gauge(name, text, [(record, value(record)) for record in living]))
    for name, text, of_gpu in GPU_GAUGES:
        found.append(_gauge(name, text, [(record, of_gpu(record.gpu)) for record in living if record.gpu]))
    return found


def _gauge(name: str, text: str, values: Sequence[tuple[WorkerRecord, float | None]]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=["model_name", "cid"])
    for record, value in values:
        if value is not None:
            gauge.add_metric([record.model, record.cid], value)
    return gauge
