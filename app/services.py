"""The composition root of a web process: makes every collaborator once."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from app.dispatch.activity import Activity
from app.dispatch.dispatcher import Dispatcher
from app.dispatch.heartbeat import WebHeartbeat
from app.dispatch.monitor import RequestMonitor
from app.dispatch.request_metrics import RequestMetrics
from app.dispatch.resumption import Resumption
from app.dispatch.worker_view import WorkerView
from app.http.auth import Gate, Limiter
from app.http.operators import Operators
from app.http.origin import OriginCheck
from app.http.request_body import BodyBudget, BodyReader
from app.http.request_trace import RequestTraces
from app.image_input.fetch import ImageFetcher
from app.operations.metrics import DeploymentMetrics
from app.operations.process_metrics import ProcessMetrics
from app.operations.warnings import Warnings
from app.process import WebProcess
from catalogue import CHAT, Catalogue
from config import Settings
from node.client import NodeClient
from node.deployment import Deployment
from node.election import Election
from node.lock import NodeLock
from node.reconciler import ELECTION_TTL_S, Reconciler
from protocol.alarms import Alarms
from protocol.celery_app import create_celery
from protocol.connections import RedisClient, connect_redis, namespace_of
from protocol.drains import Drains
from protocol.event_router import EventRouter
from protocol.image_store import ImageStore
from protocol.leases import Leases
from protocol.metrics import MetricStore
from protocol.names import Keys
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue, claim_ttl_s
from protocol.resumable_streams import ResumableStreams


@dataclass(frozen=True)
class _Redis:
    """How a web process gets to Redis. `web_id`: its own id there."""

    client: RedisClient
    background: RedisClient
    """A burst of requests may use all connections of `client`. What the process does by itself has its own:
    it tells whether Redis answers, and keeps the lease."""
    keys: Keys
    web_id: str


@dataclass(frozen=True)
class Shared:
    """What the processes of a deployment share in Redis, as this process reads and writes it."""

    leases: Leases
    worker_view: WorkerView
    drains: Drains
    requests: OpenRequests
    activity: Activity
    queue: JobQueue
    router: EventRouter
    image_store: ImageStore
    metric_store: MetricStore


@dataclass(frozen=True)
class Services:
    """The collaborators that `create_app` hands to hooks, blueprints and commands, to each what it uses."""

    deployment: Deployment
    process: WebProcess
    gate: Gate
    origins: OriginCheck
    operators: Operators
    metrics: ProcessMetrics
    deployment_metrics: DeploymentMetrics
    traces: RequestTraces
    shared: Shared
    dispatcher: Dispatcher
    resumption: Resumption
    bodies: BodyReader
    warnings: Warnings
    fetcher: ImageFetcher
    redis: RedisClient
    node_lock: NodeLock


def build_services(settings: Settings, catalogue: Catalogue) -> Services:
    """Make everything. Nothing connects or starts yet."""
    namespace = namespace_of(settings, catalogue)
    redis = _Redis(connect_redis(settings), connect_redis(settings), Keys.of(namespace), uuid.uuid4().hex)
    names = [entry.name for entry in catalogue.models]
    shared = _build_shared(settings, names, redis)
    registry = CollectorRegistry()
    metrics = ProcessMetrics(registry, shared.router, shared.metric_store, web_id=redis.web_id)
    traces = RequestTraces(settings.otel_exporter_otlp_endpoint, redis.web_id)
    deployment = Deployment(settings, namespace, catalogue.project)
    node_lock = NodeLock(redis.background, redis.keys, settings.node_url, settings.service_id)
    process = WebProcess(
        router=shared.router,
        worker_view=shared.worker_view,
        heartbeat=_build_heartbeat(redis, shared, metrics),
        reconciler=_build_reconciler(settings, redis, shared.leases, node_lock, deployment),
        traces=traces,
        warnings=settings.warnings(),
    )
    gate = Gate(settings, _build_limiter(settings, redis, shared.worker_view))
    origins = OriginCheck(settings)
    return Services(
        deployment=deployment,
        process=process,
        gate=gate,
        origins=origins,
        operators=Operators(settings, origins, gate.carries_one_of),
        metrics=metrics,
        deployment_metrics=DeploymentMetrics(
            names,
            shared.metric_store,
            shared.leases,
            shared.queue,
            shared.worker_view,
            publish=metrics.publish,
        ),
        traces=traces,
        shared=shared,
        dispatcher=_build_dispatcher(settings, redis, shared, process, RequestMetrics(registry)),
        resumption=_build_resumption(settings, redis, shared, process, gate),
        bodies=BodyReader(BodyBudget()),
        warnings=_build_warnings(settings, catalogue, redis, shared),
        fetcher=ImageFetcher(
            allowed_hosts=settings.allowed_image_hosts,
            public_url=settings.public_url,
            read_own=shared.image_store.get,
        ),
        redis=redis.background,
        node_lock=node_lock,
    )


def _build_shared(settings: Settings, models: Sequence[str], redis: _Redis) -> Shared:
    background, keys = redis.background, redis.keys
    leases = Leases(background, keys)
    queue = JobQueue(
        redis.client,
        keys,
        create_celery(settings, keys),
        claim_ttl_s=claim_ttl_s(settings),
        background=background,
    )
    queue.prepare(models)
    return Shared(
        leases=leases,
        worker_view=WorkerView(leases),
        drains=Drains(background, keys),
        requests=OpenRequests(background, keys, mark_ttl_s=claim_ttl_s(settings)),
        activity=Activity(background, keys, models),
        queue=queue,
        router=EventRouter(background, keys, redis.web_id),
        image_store=ImageStore(
            redis.client, keys, ttl_s=settings.image_ttl_s, capacity_bytes=settings.image_store_mb * 2**20
        ),
        metric_store=MetricStore(background, keys),
    )


def _build_heartbeat(redis: _Redis, shared: Shared, metrics: ProcessMetrics) -> WebHeartbeat:
    monitor = RequestMonitor(redis.background, redis.keys, shared.worker_view, shared.router, shared.queue)
    return WebHeartbeat(
        redis.web_id,
        shared.leases,
        shared.worker_view,
        shared.queue,
        shared.activity,
        monitor,
        gap_seen=shared.router.gap_seen,
        publish_metrics=metrics.publish,
    )


def _build_reconciler(
    settings: Settings, redis: _Redis, leases: Leases, node_lock: NodeLock, deployment: Deployment
) -> Reconciler | None:
    if not settings.node_url:
        return None
    return Reconciler(
        Election(
            redis.background, redis.keys.reconciler(settings.node_url, settings.service_id), ELECTION_TTL_S
        ),
        leases,
        NodeClient(settings.node_url),
        node_lock,
        deployment=deployment,
    )


def _build_dispatcher(
    settings: Settings, redis: _Redis, shared: Shared, process: WebProcess, metrics: RequestMetrics
) -> Dispatcher:
    return Dispatcher(
        settings,
        web_id=redis.web_id,
        queue=shared.queue,
        router=shared.router,
        worker_view=shared.worker_view,
        requests=shared.requests,
        metrics=metrics,
        connected=process.connected,
        draining_for_s=process.draining_for_s,
    )


def _build_resumption(
    settings: Settings, redis: _Redis, shared: Shared, process: WebProcess, gate: Gate
) -> Resumption:
    return Resumption(
        ResumableStreams(redis.client, redis.keys, ttl_s=claim_ttl_s(settings)),
        shared.router,
        shared.requests,
        web_id=redis.web_id,
        deadline_s=CHAT.deadline_s(settings),
        grace_s=settings.stream_grace_s,
        owner=gate.caller,
        draining_for_s=process.draining_for_s,
    )


def _build_warnings(settings: Settings, catalogue: Catalogue, redis: _Redis, shared: Shared) -> Warnings:
    return Warnings(
        settings,
        catalogue.models,
        shared.worker_view,
        redis.background,
        Alarms(redis.background, redis.keys),
        shared.drains,
    )


def _build_limiter(settings: Settings, redis: _Redis, worker_view: WorkerView) -> Limiter | None:
    if not (settings.rate_limit and settings.api_keys):
        return None
    # imported here, because few deployments have a limit and the others start sooner without the library
    from app.http.rate_limit import RateLimiter

    return RateLimiter(settings.rate_limit, redis.client, redis.keys, reachable=lambda: worker_view.reachable)
