"""The composition root of a web process: makes every collaborator once."""

import uuid
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from app.dispatch.activity import Activity
from app.dispatch.dispatcher import Dispatcher
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
from app.operations.metrics import Metrics
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
class Services:
    """The collaborators that `create_app` hands to hooks, blueprints and commands, to each what it uses."""

    deployment: Deployment
    process: WebProcess
    gate: Gate
    origins: OriginCheck
    operators: Operators
    metrics: Metrics
    traces: RequestTraces
    dispatcher: Dispatcher
    resumption: Resumption
    bodies: BodyReader
    worker_view: WorkerView
    activity: Activity
    warnings: Warnings
    image_store: ImageStore
    fetcher: ImageFetcher
    redis: RedisClient
    leases: Leases
    drains: Drains
    requests: OpenRequests
    node_lock: NodeLock


def build_services(settings: Settings, catalogue: Catalogue) -> Services:
    """Make everything. Nothing connects or starts yet."""
    namespace = namespace_of(settings, catalogue)
    keys = Keys.of(namespace)
    client = connect_redis(settings)
    # A burst of requests may use all connections of `client`. What the process does by itself has its own: it tells
    # whether Redis answers, and keeps the lease.
    background = connect_redis(settings)
    web_id = uuid.uuid4().hex
    leases = Leases(background, keys)
    drains = Drains(background, keys)
    requests = OpenRequests(background, keys, mark_ttl_s=claim_ttl_s(settings))
    worker_view = WorkerView(leases)
    activity = Activity(background, keys, [entry.name for entry in catalogue.models])
    celery = create_celery(settings, keys)
    queue = JobQueue(client, keys, celery, claim_ttl_s=claim_ttl_s(settings), background=background)
    queue.prepare(entry.name for entry in catalogue.models)
    router = EventRouter(background, keys, web_id)
    deployment = Deployment(settings, namespace, catalogue.project)
    node_lock = NodeLock(background, keys, settings.node_url, settings.service_id)
    reconciler = None
    if settings.node_url:
        reconciler = Reconciler(
            Election(background, keys.reconciler(settings.node_url, settings.service_id), ELECTION_TTL_S),
            leases,
            NodeClient(settings.node_url),
            node_lock,
            deployment=deployment,
        )
    registry = CollectorRegistry()
    metrics = Metrics(
        registry,
        web_id=web_id,
        models=[entry.name for entry in catalogue.models],
        store=MetricStore(background, keys),
        leases=leases,
        queue=queue,
        worker_view=worker_view,
        router=router,
    )
    traces = RequestTraces(settings.otel_exporter_otlp_endpoint, web_id)
    process = WebProcess(
        router=router,
        worker_view=worker_view,
        monitor=RequestMonitor(
            background,
            keys,
            web_id=web_id,
            leases=leases,
            worker_view=worker_view,
            router=router,
            queue=queue,
            activity=activity,
            publish_metrics=metrics.publish,
        ),
        reconciler=reconciler,
        traces=traces,
        warnings=settings.warnings(),
    )
    image_store = ImageStore(
        client, keys, ttl_s=settings.image_ttl_s, capacity_bytes=settings.image_store_mb * 2**20
    )
    gate = Gate(settings, _build_limiter(settings, client, keys, worker_view))
    origins = OriginCheck(settings)
    return Services(
        deployment=deployment,
        process=process,
        gate=gate,
        origins=origins,
        operators=Operators(settings, origins, gate.carries_one_of),
        metrics=metrics,
        traces=traces,
        dispatcher=Dispatcher(
            settings,
            web_id=web_id,
            queue=queue,
            router=router,
            worker_view=worker_view,
            requests=requests,
            metrics=RequestMetrics(registry),
            connected=process.connected,
            draining_for_s=process.draining_for_s,
        ),
        resumption=Resumption(
            ResumableStreams(client, keys, ttl_s=claim_ttl_s(settings)),
            router,
            requests,
            web_id=web_id,
            deadline_s=CHAT.deadline_s(settings),
            grace_s=settings.stream_grace_s,
            owner=gate.caller,
            draining_for_s=process.draining_for_s,
        ),
        bodies=BodyReader(BodyBudget()),
        worker_view=worker_view,
        activity=activity,
        warnings=Warnings(
            settings, catalogue.models, worker_view, background, Alarms(background, keys), drains
        ),
        image_store=image_store,
        fetcher=ImageFetcher(
            allowed_hosts=settings.allowed_image_hosts,
            public_url=settings.public_url,
            read_own=image_store.get,
        ),
        redis=background,
        leases=leases,
        drains=drains,
        requests=requests,
        node_lock=node_lock,
    )


def _build_limiter(
    settings: Settings, client: RedisClient, keys: Keys, worker_view: WorkerView
) -> Limiter | None:
    if not (settings.rate_limit and settings.api_keys):
        return None
    # imported here, because few deployments have a limit and the others start sooner without the library
    from app.http.rate_limit import RateLimiter

    return RateLimiter(settings.rate_limit, client, keys, reachable=lambda: worker_view.reachable)
