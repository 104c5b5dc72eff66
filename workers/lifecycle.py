"""A worker's life: load → warm up → canary → lease → register → serve; at SIGTERM unregister → drain → exit.

The whole story of the process stands in `WorkerProcess`, in the order in which it happens; Celery's signals drive it.
In the threads pool all of them fire in this one process (docs/adr/0001-threads-pool.md).
"""

import gc
import logging
import os
import signal
import threading
import time
import uuid
from functools import partial
from typing import Any, NoReturn

import msgspec
from celery import Celery
from celery.signals import worker_init, worker_ready, worker_shutdown
from redis.exceptions import RedisError

from catalogue import Catalogue, ModelEntry
from config import EXIT_CONFIGURATION, Settings
from node.client import NodeClient
from node.lock import NodeLock
from node.registrar import NoRegistrar, Registrar
from node.registration import default_cid, registration_for
from node.web_watch import http_probe
from protocol.celery_app import visibility_timeout_s
from protocol.connections import connect_redis, namespace_of
from protocol.errors import WorkerLost
from protocol.event_sender import EventSender
from protocol.events import Failed
from protocol.image_store import ImageStore
from protocol.leases import Leases, WorkerRecord, WorkerState
from protocol.names import GENERATE_TASK, Keys
from protocol.queue import JobQueue
from workers.canary import SwitchableEmit, run_canary
from workers.device import visible_gpus
from workers.engines import create_engine
from workers.engines.base import Engine, EngineLoadError
from workers.heartbeat import Heartbeat
from workers.image_keeper import keep_image
from workers.runner import Runner
from workers.stop_signal import StopSignal

log = logging.getLogger(__name__)

EXIT_HUNG = 70
DRAIN_POLL_S = 0.2
EXIT_S = 8.0


class WorkerProcess:
    """The collaborators of one worker process and the order in which they come and go."""

    def __init__(self, settings: Settings, catalogue: Catalogue, entry: ModelEntry, celery: Celery) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._entry = entry
        self._celery = celery
        self._namespace = namespace_of(settings, catalogue)
        self._keys = Keys.of(self._namespace)
        self._state: WorkerState = "loading"
        self._last_error = ""
        self._state_lock = threading.Lock()
        self._runner: Runner | None = None

    def connect_signals(self) -> None:
        """Let Celery's signals drive this process, and give it its one task."""
        # weak=False: Celery would drop bound methods of an object that nobody else holds
        worker_init.connect(self._on_init, weak=False)
        worker_ready.connect(self._on_ready, weak=False)
        worker_shutdown.connect(self._on_shutdown, weak=False)

        def generate(request_id: str) -> None:
            if self._runner is None:
                raise RuntimeError("a task came before the engine was loaded")
            self._runner.run(request_id)

        self._celery.task(name=GENERATE_TASK)(generate)

    # ----- coming up

    def _on_init(self, sender: Any, **_: Any) -> None:
        # Celery's own handler comes later; until then SIGTERM would end the process and leave the lease to lapse
        signal.signal(signal.SIGTERM, lambda *_: None)
        stop = StopSignal()
        self._connect(node_name=str(sender))
        self._heartbeat.start()
        # from now on a stop ends this process, wherever it hangs: a Celery that loses Redis before it is ready waits for it
        threading.Thread(target=self._drain, args=(stop,), name="drain", daemon=True).start()
        # before the load: what a crashed incarnation of this worker left at the node is taken off meanwhile
        self._registrar.start()
        try:
            self._load()
        except EngineLoadError as error:
            self._give_up(str(error), EXIT_CONFIGURATION)
        except Exception as error:
            log.exception("the engine of %s could not be started", self._entry.name)
            self._give_up(f"{type(error).__name__}: {error}", 1)

    def _connect(self, node_name: str) -> None:
        settings, entry = self._settings, self._entry
        self._gpus = visible_gpus(settings)
        slot = self._gpus or [node_name]
        self._cid = settings.worker_cid or default_cid(
            settings.service_id, self._namespace, os.uname().nodename, *slot, entry.name
        )
        self._incarnation_id = f"{self._cid}:{uuid.uuid4().hex[:12]}"
        redis = connect_redis(settings)
        self._leases = Leases(redis, self._keys)
        self._queue = JobQueue(
            redis, self._keys, self._celery, claim_ttl_s=visibility_timeout_s(settings) + 60
        )
        pictures = ImageStore(
            redis,
            self._keys,
            ttl_s=settings.image_ttl_s,
            capacity_bytes=settings.image_store_mb * 2**20,
        )
        registration = registration_for(entry, settings, self._catalogue.project, self._cid)
        self._registrar: Registrar | NoRegistrar = NoRegistrar()
        if settings.node_url and registration is not None:
            self._registrar = Registrar(
                registration,
                NodeClient(settings.node_url),
                http_probe(settings.service_url),
                NodeLock(redis, self._keys, settings.node_url, settings.service_id).turn,
                on_change=lambda: self._heartbeat.beat_now(),
            )
        self._heartbeat = Heartbeat(
            self._leases,
            self._queue,
            describe=self._describe,
            on_expired=self._registrar.lease_was_lost,
            on_replaced=self._make_way,
            on_hung=lambda reason: self._die(reason, EXIT_HUNG),
            hang_s=settings.hang_s,
        )
        self._sender = EventSender(
            redis,
            self._keys,
            prepare=partial(keep_image, pictures),
        )

    def _load(self) -> None:
        started = time.monotonic()
        log.info("loading %s from %s", self._entry.name, self._entry.weights)
        outlet = SwitchableEmit()
        engine: Engine = create_engine(self._entry)
        engine.load(outlet)
        run_canary(engine, self._entry, outlet)
        outlet.target = self._sender.emit
        self._engine = engine
        self._runner = Runner(
            model=self._entry.name,
            incarnation_id=self._incarnation_id,
            queue=self._queue,
            engine=engine,
            sender=self._sender,
        )
        self._sender.start()
        self._heartbeat.watch(engine, self._runner)
        # what stands in memory now stays: a full collection, in the middle of a burst, would look through all of it
        gc.collect()
        gc.freeze()
        log.info("loaded %s in %.1f s", self._entry.name, time.monotonic() - started)

    def _on_ready(self, **_: Any) -> None:
        with self._state_lock:
            if self._state == "draining":
                return
            self._state = "ready"
        self._heartbeat.beat_now()
        self._registrar.set_serving(True)
        log.info("worker %s serves %s", self._cid, self._entry.name)

    # ----- going down

    def _drain(self, stop: StopSignal) -> None:
        """Waits for the stop, then: off the node first, then at most DRAIN_S for what runs, then the rest fails."""
        stop.wait()
        with self._state_lock:
            self._state = "draining"
        self._heartbeat.beat_now()
        self._registrar.drain()
        if self._runner is not None:
            self._finish(self._runner)
            # Celery ends the process now, unless Redis went first: then it would try to reconnect for ever
            time.sleep(EXIT_S)
            log.warning("Celery did not end within %g s of the last request: ending without it", EXIT_S)
            self._sender.stop(1.0)
        self._heartbeat.stop()
        self._release()
        os._exit(0)

    def _finish(self, runner: Runner) -> None:
        give_up_at = time.monotonic() + self._settings.drain_s
        while runner.running() and time.monotonic() < give_up_at:
            time.sleep(DRAIN_POLL_S)
        if runner.running():
            log.warning(
                "%d requests did not finish within %g s", len(runner.running()), self._settings.drain_s
            )
        self._heartbeat.spare_engine()
        self._engine.close()

    def _on_shutdown(self, **_: Any) -> None:
        self._registrar.drain()
        self._sender.stop(2.0)
        self._heartbeat.stop()
        self._release()

    def _make_way(self) -> None:
        """A newer incarnation of this cid lives: entry, lease and record are its own now."""
        self._registrar.abandon()
        self._die(
            "a newer worker with the same cid has started; each worker needs a cid of its own",
            EXIT_CONFIGURATION,
        )

    def _die(self, reason: str, status: int) -> NoReturn:
        """End a process that can't serve and can't be trusted to end by itself; the supervisor starts another."""
        log.critical("worker %s ends: %s", self._cid, reason)
        self._last_error = reason
        self._state = "draining"
        self._registrar.drain()
        if self._runner is not None:
            self._runner.fail_all(Failed.of(WorkerLost()))
            self._sender.stop(2.0)
        if status != EXIT_CONFIGURATION:
            self._release()
        os._exit(status)

    def _give_up(self, reason: str, status: int) -> NoReturn:
        # the supervisor repeats a worker's last line as the reason why the start failed
        log.critical("%s", reason)
        self._heartbeat.stop()
        self._release()
        raise SystemExit(status)

    def _release(self) -> None:
        """End the lease. A node that still has the entry is the reconciler's business: leave it the record."""
        try:
            on_node = self._registrar.maybe_registered
            record = msgspec.structs.replace(self._describe(), registered=on_node)
            self._leases.release_worker(record, keep_record=on_node)
        except RedisError as error:
            log.warning("lease not released, it lapses by itself: %s", error)

    # ----- what the others ask

    def _describe(self) -> WorkerRecord:
        # before the engine's steps: a record that says nothing runs must count all that ran
        running = len(self._runner.running()) if self._runner is not None else 0
        status = self._engine.status() if self._runner is not None else None
        return WorkerRecord(
            cid=self._cid,
            incarnation_id=self._incarnation_id,
            model=self._entry.name,
            tasks=self._entry.tasks,
            project=self._catalogue.project,
            pid=os.getpid(),
            host=os.uname().nodename,
            service_id=self._settings.service_id,
            node=self._settings.node_url,
            gpus=self._gpus,
            state=self._state,
            running=running,
            registered=self._registrar.registered,
            last_error=self._last_error or self._registrar.last_error,
            steps=status.steps if status is not None else 0,
        )
