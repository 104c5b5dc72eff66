"""The composition root of a worker process: makes every collaborator once."""

import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from celery import Celery

from catalogue import Catalogue, ModelEntry
from config import Settings
from node.client import NodeClient
from node.lock import NodeLock
from node.registrar import NoRegistrar, Registrar
from node.registration import default_cid, registration_for
from node.web_watch import http_probe
from protocol.connections import RedisClient, connect_redis, namespace_of
from protocol.drains import Drains
from protocol.event_sender import EventSender
from protocol.image_store import ImageStore
from protocol.leases import Leases, WorkerRecord
from protocol.metrics import MetricStore
from protocol.names import Keys
from protocol.queue import JobQueue, claim_ttl_s
from protocol.resumable_streams import ResumableStreams
from workers.abandoned import AbandonedRequests
from workers.device import visible_gpus
from workers.engines import LazyEngine
from workers.engines.base import Engine
from workers.gpu_time import GpuTime
from workers.gpu_watch import GpuWatch
from workers.heartbeat import Heartbeat
from workers.held_lease import HeldLease
from workers.image_keeper import keep_image
from workers.intake import Intake
from workers.job_log import JobLog
from workers.metrics import WorkerMetrics
from workers.operator_drain import OperatorDrain
from workers.queue_watch import QueueWatch
from workers.runner import Runner
from workers.status import WorkerStatus
from workers.stream_readers import StreamReaders
from workers.throughput import Throughput
from workers.watchdog import Watchdog


@dataclass(frozen=True)
class Worker:
    """The collaborators of one worker process, for workers/lifecycle.py. Nothing runs yet."""

    entry: ModelEntry
    engine: Engine
    sender: EventSender
    runner: Runner
    registrar: Registrar | NoRegistrar
    status: WorkerStatus
    operator_drain: OperatorDrain
    watchdog: Watchdog
    gpu_watch: GpuWatch
    heartbeat: Heartbeat
    metrics: WorkerMetrics
    stop_traces: Callable[[], None]
    leases: Leases
    drain_s: float


def build_worker(
    settings: Settings, catalogue: Catalogue, entry: ModelEntry, celery: Celery, node_name: str
) -> Worker:
    """Make everything; nothing connects yet. `node_name`: Celery's name of this worker."""
    namespace = namespace_of(settings, catalogue)
    keys = Keys.of(namespace)
    redis = connect_redis(settings)
    identity = identify(settings, catalogue, entry, namespace, node_name)
    leases = Leases(redis, keys)
    queue = JobQueue(redis, keys, celery, claim_ttl_s=claim_ttl_s(settings))
    sender = _build_sender(settings, redis, keys)
    engine = LazyEngine(entry, gpus=identity.gpus, gpu_share=settings.worker_gpu_share)
    throughput = Throughput(entry.engine.max_batch_size)
    gpu_time = GpuTime()
    metrics = WorkerMetrics(identity, engine, gpu_time, MetricStore(redis, keys))
    on_ended, stop_traces = _on_ended(settings, identity, entry, metrics)
    runner = Runner(identity, queue, engine, sender, throughput, gpu_time, on_ended=on_ended)
    record_changed = threading.Event()
    registrar = _build_registrar(settings, catalogue, entry, identity.cid, redis, keys, record_changed)
    intake = Intake(celery)
    gpu_watch = GpuWatch(identity.gpus)
    status = WorkerStatus(identity, engine, runner, registrar, throughput, intake, gpu_watch, record_changed)
    operator_drain = OperatorDrain(Drains(redis, keys), node_name, status, registrar, intake)
    watchdog = Watchdog(engine, settings.hang_s)

    def on_expired() -> None:
        metrics.write_off_running()
        registrar.lease_was_lost()

    readers = StreamReaders(ResumableStreams(redis, keys, ttl_s=claim_ttl_s(settings)), runner, sender)
    heartbeat = Heartbeat(
        watchdog,
        HeldLease(leases, get_record=status.record, changed=record_changed, on_expired=on_expired),
        QueueWatch(queue, runner, throughput, model=entry.name, is_ready=lambda: status.ready),
        AbandonedRequests(queue, leases, readers, runner),
        look_for_drain=operator_drain.look,
        publish_metrics=metrics.publish,
    )
    return Worker(
        entry=entry,
        engine=engine,
        sender=sender,
        runner=runner,
        registrar=registrar,
        status=status,
        operator_drain=operator_drain,
        watchdog=watchdog,
        gpu_watch=gpu_watch,
        heartbeat=heartbeat,
        metrics=metrics,
        stop_traces=stop_traces,
        leases=leases,
        drain_s=settings.drain_s,
    )


def identify(
    settings: Settings, catalogue: Catalogue, entry: ModelEntry, namespace: str, node_name: str
) -> WorkerRecord:
    """The record of this incarnation, with the fields that never change."""
    host, gpus = os.uname().nodename, visible_gpus(settings)
    # the Celery name too: two workers of one model may share a GPU, or have none
    parts = (host, *gpus, node_name, entry.name)
    cid = settings.worker_cid or default_cid(settings.service_id, namespace, *parts)
    return WorkerRecord(
        cid=cid,
        incarnation_id=f"{cid}:{uuid.uuid4().hex[:12]}",
        name=node_name,
        model=entry.name,
        tasks=entry.tasks,
        project=catalogue.project,
        pid=os.getpid(),
        host=host,
        service_id=settings.service_id,
        node=settings.node_url,
        gpus=gpus,
    )


def _build_sender(settings: Settings, redis: RedisClient, keys: Keys) -> EventSender:
    capacity_bytes = settings.image_store_mb * 2**20
    image_store = ImageStore(redis, keys, ttl_s=settings.image_ttl_s, capacity_bytes=capacity_bytes)
    return EventSender(redis, keys, prepare=partial(keep_image, image_store))


def _on_ended(
    settings: Settings, identity: WorkerRecord, entry: ModelEntry, metrics: WorkerMetrics
) -> tuple[Callable[[JobLog], None], Callable[[], None]]:
    """What is done with each job that has ended, and what sends the traces that are left at the end."""
    write_receipt = _receipts(settings, identity, entry)
    trace_job, stop_traces = _traces(settings, identity)

    def on_ended(job: JobLog) -> None:
        metrics.ended(job)
        write_receipt(job)
        trace_job(job)

    return on_ended, stop_traces


def _traces(
    settings: Settings, identity: WorkerRecord
) -> tuple[Callable[[JobLog], None], Callable[[], None]]:
    """What makes the spans of a job, and what sends those that are left at the end."""
    if not settings.otel_exporter_otlp_endpoint:
        return lambda job: None, lambda: None
    # imported here, as receipts are
    from workers.job_traces import JobTraces

    traces = JobTraces(settings.otel_exporter_otlp_endpoint, identity)
    return traces.trace, traces.stop


def _receipts(settings: Settings, identity: WorkerRecord, entry: ModelEntry) -> Callable[[JobLog], None]:
    """What writes the receipt of a job. Raises ConfigurationError."""
    if settings.receipts is None:
        return lambda job: None
    # imported here, because few deployments have receipts and the others start without the library
    from workers.receipts import ReceiptWriter

    return ReceiptWriter(settings.receipts, identity, entry).write


def _build_registrar(
    settings: Settings,
    catalogue: Catalogue,
    entry: ModelEntry,
    cid: str,
    redis: RedisClient,
    keys: Keys,
    record_changed: threading.Event,
) -> Registrar | NoRegistrar:
    registration = registration_for(entry, settings, catalogue.project, cid)
    if not settings.node_url or registration is None:
        return NoRegistrar()
    return Registrar(
        registration,
        NodeClient(settings.node_url),
        http_probe(settings.service_url, namespace_of(settings, catalogue), entry.name),
        NodeLock(redis, keys, settings.node_url, settings.service_id).turn,
        on_change=record_changed.set,
    )
