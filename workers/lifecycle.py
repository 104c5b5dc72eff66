"""The order of events in a worker: load, warm up, canary, register, serve; at a stop unregister, drain, exit.

The lease is held from before the load until the exit. workers/celery_signals.py drives all this.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
from redis.exceptions import RedisError

from config import EXIT_CONFIGURATION, EXIT_TEMPORARY
from protocol.errors import EngineStopped, ServiceError, WorkerLost
from protocol.events import Failed
from workers.buffered_log import flush_lines
from workers.canary import SwitchableEmit, run_canary
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.held_lease import WorkerReplaced
from workers.job_log import log as job_log
from workers.queue_watch import NotConsuming
from workers.services import Worker
from workers.stop_signal import StopSignal
from workers.watchdog import EngineHung

log = logging.getLogger(__name__)

EXIT_HUNG = 70
DRAIN_POLL_S = 0.2
EXIT_S = 8.0
END_S = 30.0
"""How long the steps of an end may take together, apart from the time that requests are given."""


class Lifecycle:
    """Starts and stops the collaborators of one worker process in order."""

    def __init__(
        self, worker: Worker, stop: StopSignal, end_process: Callable[[int], object] = os._exit
    ) -> None:
        self._worker = worker
        self._stop = stop
        self._end_process = end_process
        self._loaded = False

    def start(self) -> None:
        """Take the lease and load the model. Raises SystemExit when the model can't be loaded."""
        worker = self._worker
        worker.sender.start()
        worker.gpu_watch.start()
        threading.Thread(target=self._hold_lease, name="heartbeat", daemon=True).start()
        # from here on a stop ends the process in any state, also while Celery waits for a lost Redis
        threading.Thread(target=self._drain, name="drain", daemon=True).start()
        # before the load, so that an entry which a killed incarnation left at the node is removed meanwhile
        worker.registrar.start()
        try:
            self._load()
        except TemporaryLoadError as error:
            self._give_up(f"{error}; a later start may succeed", EXIT_TEMPORARY)
        except EngineLoadError as error:
            self._give_up(str(error), EXIT_CONFIGURATION)
        except Exception as error:
            log.exception("the engine of %s could not be started", worker.entry.name)
            self._give_up(f"{type(error).__name__}: {error}", 1)

    def serve(self, consumer: Any) -> None:
        """Register with the node: Celery takes requests from now on. `consumer`: Celery's of this process."""
        worker = self._worker
        if worker.status.set_ready():
            worker.operator_drain.serve(consumer)
            log.info("worker %s serves %s", worker.status.identity.cid, worker.entry.name)

    def shut_down(self) -> None:
        """Unregister and release the lease: Celery has ended, with every request. The process exits next."""
        self._worker.registrar.drain()
        self._worker.sender.stop(2.0)
        self._release()

    def _load(self) -> None:
        worker, started = self._worker, time.monotonic()
        log.info("loading %s from %s", worker.entry.name, worker.entry.weights)
        emit = SwitchableEmit()
        worker.engine.load(emit)
        # the canary is watched too: an engine that is too slow for it would be stopped at the first request
        worker.watchdog.start()
        run_canary(worker.engine, worker.entry, emit)
        emit.target = worker.sender.emit
        # what is in memory now stays: full collections, perhaps during a burst, need not visit it
        gc.collect()
        gc.freeze()
        self._loaded = True
        log.info(
            "%s answered the canary request, %.1f s after the start",
            worker.entry.name,
            time.monotonic() - started,
        )

    def _give_up(self, reason: str, status: int) -> NoReturn:
        # the supervisor shows the last line of a worker as the reason why its start failed
        log.critical("%s", reason)
        self._release()
        raise SystemExit(status)

    def _drain(self) -> None:
        """Wait for the stop; then unregister, let requests finish for at most DRAIN_S, and fail the rest."""
        self._stop.wait()
        worker = self._worker
        self._end_within(worker.drain_s + EXIT_S + END_S, 0)
        worker.status.set_draining()
        worker.registrar.drain()
        if self._loaded:
            self._finish_requests()
            worker.watchdog.stop()
            worker.engine.close()
            # Celery ends the process meanwhile, unless it waits for a lost Redis
            time.sleep(EXIT_S)
            log.warning("Celery did not end within %g s of the last request: ending without it", EXIT_S)
            worker.sender.stop(1.0)
        self._release()
        self._end(0)

    def _finish_requests(self) -> None:
        worker = self._worker
        give_up_at = time.monotonic() + worker.drain_s
        while worker.runner.running() and time.monotonic() < give_up_at:
            time.sleep(DRAIN_POLL_S)
        if running := worker.runner.running():
            log.warning("%d requests did not finish within %g s", len(running), worker.drain_s)

    def _hold_lease(self) -> None:
        try:
            self._worker.heartbeat.run()
        except WorkerReplaced:
            # lease, record and entry belong to the newer worker
            self._worker.registrar.abandon()
            reason = (
                "a newer worker with the same cid has started; each worker needs a name or WORKER_CID of its own, "
                "and each deployment on this Redis a NAMESPACE"
            )
            self._fail(reason, EXIT_CONFIGURATION, WorkerLost())
        except NotConsuming as error:
            self._fail(str(error), EXIT_HUNG, WorkerLost())
        except EngineHung as error:
            advice = "" if self._loaded else "; raise HANG_S or serve a smaller model"
            self._fail(f"{error}{advice}", EXIT_HUNG, EngineStopped())

    def _fail(self, reason: str, status: int, failure: ServiceError) -> None:
        """End a process that can't serve, nor end in order; the supervisor starts another.

        Running requests get `failure`.
        """
        worker = self._worker
        self._end_within(END_S, status)
        log.critical("worker %s ends: %s", worker.status.identity.cid, reason)
        worker.status.set_draining(reason)
        worker.registrar.drain()
        worker.runner.fail_all(Failed.of(failure))
        worker.sender.stop(2.0)
        if status != EXIT_CONFIGURATION:
            self._release()
        self._end(status)

    def _end(self, status: int) -> None:
        try:
            flush_lines(job_log)
        finally:
            self._end_process(status)

    def _end_within(self, seconds: float, status: int) -> None:
        """End the process after `seconds`, even if a thread is blocked, as by a log that nobody reads."""
        timer = threading.Timer(seconds, self._end_process, [status])
        timer.daemon = True
        timer.start()

    def _release(self) -> None:
        """End the lease. The record stays for the reconciler if the node may still have the entry."""
        worker = self._worker
        worker.heartbeat.stop()
        try:
            on_node = worker.registrar.maybe_registered
            record = msgspec.structs.replace(worker.status.record(), registered=on_node)
            worker.leases.release_worker(record, keep_record=on_node)
            worker.metrics.publish()
        except RedisError as error:
            log.warning("the lease was not released, it expires: %s", error)
        worker.stop_traces()
