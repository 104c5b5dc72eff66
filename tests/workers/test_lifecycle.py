"""workers.lifecycle and celery_signals with stand-ins for all collaborators but the status: what happens in
which order."""

import errno
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, cast
from unittest.mock import Mock

import pytest
from celery import Celery
from celery.signals import worker_init, worker_ready, worker_shutdown
from redis.exceptions import ConnectionError as RedisConnectionError

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, EXIT_TEMPORARY
from protocol.celery_app import consume
from protocol.errors import EngineError, OutOfMemory, ServiceError
from protocol.events import Delta, Failed, Finished
from protocol.jobs import Job
from protocol.leases import WorkerRecord
from protocol.names import Keys
from tests.deployment import wait_until
from tests.records import worker_record
from workers.celery_signals import connect_signals
from workers.engines.base import Emit, EngineLoadError, EngineStatus, TemporaryLoadError
from workers.held_lease import WorkerReplaced
from workers.job_log import log as job_log
from workers.lifecycle import EXIT_HUNG, Lifecycle
from workers.lifecycle import log as lifecycle_log
from workers.operator_drain import OperatorDrain
from workers.services import Worker
from workers.status import WorkerStatus
from workers.watchdog import EngineHung

IDENTITY = worker_record(model="m")
CATALOGUE = Catalogue.model_validate(
    {"project": "P", "models": [{"name": "m", "tasks": ["chat"], "weights": "echo:"}]}
)


CONSUMER = object()
"""Celery's consumer, which only the intake uses."""


class Bench:
    """A lifecycle whose collaborators note each call in `parts.mock_calls`."""

    def __init__(self, drain_s: float = 60) -> None:
        self.parts = Mock()
        self.stop = threading.Event()
        self.heartbeat_runs = threading.Event()
        self.heartbeat_ends = threading.Event()
        self.heartbeat_error: Exception | None = None
        self.ended: list[int] = []
        self.requests: list[str] = []
        self.canary_result: Finished | Failed = Finished()
        self.emit: Emit = lambda gained: None
        parts = self.parts
        parts.engine.load.side_effect = self.load
        parts.engine.submit.side_effect = self.generate
        parts.engine.status.return_value = EngineStatus(True, 0, 0, 7, 2048)
        parts.runner.running.side_effect = lambda: list(self.requests)
        parts.registrar.registered = parts.registrar.maybe_registered = False
        parts.registrar.last_error = ""
        parts.drains.includes.return_value = False
        parts.intake.closed = True
        parts.runner.busy.side_effect = lambda: bool(self.requests)
        parts.heartbeat.run.side_effect = self.hold_lease
        parts.throughput.slots, parts.throughput.rate = 4, 2.5
        self.status = WorkerStatus(
            IDENTITY,
            parts.engine,
            parts.runner,
            parts.registrar,
            parts.throughput,
            parts.intake,
            parts.gpu_watch,
            threading.Event(),
        )
        self.worker = Worker(
            entry=CATALOGUE.models[0],
            engine=parts.engine,
            sender=parts.sender,
            runner=parts.runner,
            registrar=parts.registrar,
            status=self.status,
            operator_drain=OperatorDrain(parts.drains, "w@h", self.status, parts.registrar, parts.intake),
            watchdog=parts.watchdog,
            gpu_watch=parts.gpu_watch,
            heartbeat=parts.heartbeat,
            metrics=parts.metrics,
            stop_traces=parts.stop_traces,
            leases=parts.leases,
            drain_s=drain_s,
        )
        self.lifecycle = Lifecycle(self.worker, cast(Any, self.stop), self.ended.append)

    def load(self, emit: Emit) -> None:
        assert self.heartbeat_runs.wait(30), "the lease is held before the load"
        self.emit = emit

    def generate(self, job: Job) -> None:
        self.emit([(job.id, Delta("text")), (job.id, self.canary_result)])

    def hold_lease(self) -> None:
        self.heartbeat_runs.set()
        self.heartbeat_ends.wait(60)
        if self.heartbeat_error is not None:
            raise self.heartbeat_error

    def wait_end(self) -> int:
        """The status with which the process was ended."""
        wait_until(lambda: self.ended, timeout_s=60, what="the process ends")
        return self.ended[0]

    def calls(self) -> list[str]:
        """Names of the calls so far, without questions."""
        names = [call[0] for call in self.parts.mock_calls]
        questions = ("engine.status", "runner.running", "runner.busy", "drains.includes", "heartbeat.run")
        return [name for name in names if name not in questions]

    def released(self) -> WorkerRecord:
        """The record with which the lease was released."""
        record: WorkerRecord = self.parts.leases.release_worker.call_args.args[0]
        return record


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.lifecycle.EXIT_S", 0.0)
    monkeypatch.setattr("workers.lifecycle.DRAIN_POLL_S", 0.01)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.requests.clear()
    bench.stop.set()
    bench.heartbeat_ends.set()


STARTED = [
    "sender.start",
    "gpu_watch.start",
    "registrar.start",
    "engine.load",
    "watchdog.start",
    "engine.submit",
]


def test_it_loads_generates_once_and_registers_when_celery_is_ready(bench: Bench) -> None:
    bench.lifecycle.start()
    assert bench.calls() == STARTED
    assert bench.status.record().state == "loading"

    bench.lifecycle.serve(CONSUMER)
    assert bench.calls() == [*STARTED, "intake.connect", "registrar.set_serving"]
    bench.parts.intake.connect.assert_called_once_with(CONSUMER, closed=False)
    bench.parts.registrar.set_serving.assert_called_once_with(True)
    record = bench.status.record()
    assert record.state == "ready"
    assert (record.steps, record.slots, record.rate, record.max_model_len) == (7, 4, 2.5, 2048)


def test_events_reach_clients_only_after_the_canary(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.parts.sender.emit.assert_not_called()
    gained = [("a", Delta("text"))]
    bench.emit(gained)
    bench.parts.sender.emit.assert_called_once_with(gained)


def test_at_a_stop_it_unregisters_then_waits_for_requests_then_ends(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.lifecycle.serve(CONSUMER)
    before = bench.calls()
    bench.requests = ["a"]

    bench.stop.set()
    wait_until(lambda: bench.parts.registrar.drain.called, timeout_s=60, what="it unregisters")
    looks = bench.parts.runner.running.call_count
    wait_until(lambda: bench.parts.runner.running.call_count > looks + 3, timeout_s=60, what="it waits")
    assert bench.calls() == [*before, "registrar.drain"]
    assert bench.status.record().state == "draining"

    bench.requests = []
    assert bench.wait_end() == 0
    assert bench.calls()[len(before) :] == [
        "registrar.drain",
        "watchdog.stop",
        "engine.close",
        "sender.stop",
        "heartbeat.stop",
        "leases.release_worker",
        "metrics.publish",
        "stop_traces",
    ]


def test_a_worker_under_drain_is_not_registered_and_takes_nothing_until_it_is_resumed(bench: Bench) -> None:
    bench.parts.drains.includes.return_value = True
    bench.worker.operator_drain.look()
    bench.lifecycle.start()
    assert bench.status.record().state == "loading"
    before = bench.calls()
    bench.lifecycle.serve(CONSUMER)
    bench.parts.intake.connect.assert_called_once_with(CONSUMER, closed=True)
    bench.parts.registrar.set_serving.assert_called_once_with(False)
    bench.worker.operator_drain.look()
    assert bench.calls()[len(before) :] == ["intake.connect", "registrar.set_serving", "intake.close"]
    assert bench.status.record().state == "drained"

    before = bench.calls()
    bench.parts.drains.includes.return_value = False
    bench.worker.operator_drain.look()
    assert bench.calls()[len(before) :] == ["registrar.set_serving", "intake.open"]
    bench.parts.registrar.set_serving.assert_called_with(True)
    assert bench.status.record().state == "ready"


def test_it_is_drained_when_nothing_runs_and_no_message_can_come(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.lifecycle.serve(CONSUMER)
    bench.requests, bench.parts.intake.closed = ["a"], False
    bench.parts.drains.includes.return_value = True
    bench.worker.operator_drain.look()
    assert bench.status.record().state == "draining"
    bench.requests = []
    assert bench.status.record().state == "draining"
    bench.parts.intake.closed = True
    assert bench.status.record().state == "drained"


def test_a_worker_that_stops_is_not_resumed(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.parts.drains.includes.return_value = True
    bench.worker.operator_drain.look()
    bench.lifecycle.serve(CONSUMER)
    bench.status.set_draining()
    bench.parts.drains.includes.return_value = False
    bench.worker.operator_drain.look()
    assert "intake.open" not in bench.calls()


def test_a_drain_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(drain_s=0.05)
    bench.lifecycle.start()
    bench.requests = ["a"]
    bench.stop.set()
    assert bench.wait_end() == 0
    assert "engine.close" in bench.calls()
    assert "1 requests did not finish within 0.05 s" in caplog.text
    bench.heartbeat_ends.set()


def test_stopped_while_it_loads_it_ends_at_once_and_is_never_registered(bench: Bench) -> None:
    loading, go = threading.Event(), threading.Event()

    def load(emit: Emit) -> None:
        loading.set()
        go.wait(60)
        bench.emit = emit

    bench.parts.engine.load.side_effect = load
    starting = threading.Thread(target=bench.lifecycle.start, daemon=True)
    starting.start()
    assert loading.wait(30)

    bench.stop.set()
    assert bench.wait_end() == 0
    assert bench.calls() == [
        "sender.start",
        "gpu_watch.start",
        "registrar.start",
        "engine.load",
        "registrar.drain",
        "heartbeat.stop",
        "leases.release_worker",
        "metrics.publish",
        "stop_traces",
    ]
    # the load has ended just before the process does, and Celery is ready
    go.set()
    starting.join(30)
    bench.lifecycle.serve(CONSUMER)
    assert "registrar.set_serving" not in bench.calls()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (EngineLoadError("no such weights"), EXIT_CONFIGURATION, "no such weights"),
        (
            TemporaryLoadError("the disk is away"),
            EXIT_TEMPORARY,
            "the disk is away; a later start may succeed",
        ),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_process(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: Exception, status: int, reason: str
) -> None:
    bench.parts.engine.load.side_effect = error
    with pytest.raises(SystemExit) as ended:
        bench.lifecycle.start()
    assert ended.value.code == status
    assert bench.calls()[-3:] == ["leases.release_worker", "metrics.publish", "stop_traces"]
    # the supervisor shows this line
    assert caplog.records[-1].getMessage() == reason


@pytest.mark.parametrize(
    ("failure", "status"), [(EngineError("no kernel"), EXIT_CONFIGURATION), (OutOfMemory(), EXIT_TEMPORARY)]
)
def test_a_failed_canary_is_a_model_that_cannot_be_loaded(
    bench: Bench, failure: ServiceError, status: int
) -> None:
    bench.canary_result = Failed.of(failure)
    with pytest.raises(SystemExit) as ended:
        bench.lifecycle.start()
    assert ended.value.code == status
    assert "registrar.set_serving" not in bench.calls()


def test_a_hung_engine_ends_the_process_with_its_requests(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.lifecycle.serve(CONSUMER)
    before = bench.calls()
    bench.parts.registrar.maybe_registered = True
    bench.heartbeat_error = EngineHung("no progress")
    bench.heartbeat_ends.set()

    assert bench.wait_end() == EXIT_HUNG
    assert bench.calls()[len(before) :] == [
        "registrar.drain",
        "runner.fail_all",
        "sender.stop",
        "heartbeat.stop",
        "leases.release_worker",
        "metrics.publish",
        "stop_traces",
    ]
    (failure,) = bench.parts.runner.fail_all.call_args.args
    assert failure.code == "engine_stopped"
    released = bench.released()
    assert (released.state, released.last_error, released.registered) == ("draining", "no progress", True)


def test_a_replaced_worker_leaves_lease_and_entry_to_the_new_one(bench: Bench) -> None:
    bench.lifecycle.start()
    bench.lifecycle.serve(CONSUMER)
    before = bench.calls()
    bench.heartbeat_error = WorkerReplaced()
    bench.heartbeat_ends.set()

    assert bench.wait_end() == EXIT_CONFIGURATION
    assert bench.calls()[len(before) :] == [
        "registrar.abandon",
        "registrar.drain",
        "runner.fail_all",
        "sender.stop",
    ]


class Unwritable(logging.Handler):
    """Its lines and its flush block until `read` is set, or fail without it."""

    def __init__(self, read: threading.Event | None = None) -> None:
        super().__init__()
        self._read = read

    def emit(self, record: logging.LogRecord) -> None:
        self.flush()

    def flush(self) -> None:
        if self._read is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._read.wait(120)


def end(bench: Bench, *, stop: bool) -> None:
    """Stop a worker, or let its engine hang, and wait until its process has ended."""
    bench.lifecycle.start()
    if stop:
        bench.stop.set()
    else:
        bench.heartbeat_error = EngineHung("no progress")
        bench.heartbeat_ends.set()
    assert bench.wait_end() == (0 if stop else EXIT_HUNG)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lines_that_cannot_be_written_do_not_keep_the_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    monkeypatch.setattr(job_log, "handlers", [Unwritable()])
    end(bench, stop=stop)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("logger", [job_log, lifecycle_log], ids=["jobs", "lifecycle"])
def test_a_log_that_nobody_reads_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch, logger: logging.Logger, stop: bool
) -> None:
    bench, read = Bench(drain_s=0), threading.Event()
    monkeypatch.setattr("workers.lifecycle.END_S", 0.5)
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler := Unwritable(read))
    try:
        end(bench, stop=stop)
    finally:
        read.set()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("maybe_registered", [False, True])
def test_when_celery_has_ended_it_unregisters_and_releases_the_lease(
    bench: Bench, maybe_registered: bool
) -> None:
    bench.lifecycle.start()
    before = bench.calls()
    bench.parts.registrar.maybe_registered = maybe_registered

    bench.lifecycle.shut_down()

    assert bench.calls()[len(before) :] == [
        "registrar.drain",
        "sender.stop",
        "heartbeat.stop",
        "leases.release_worker",
        "metrics.publish",
        "stop_traces",
    ]
    # the reconciler finds what may still be at the node by the record
    assert bench.parts.leases.release_worker.call_args.kwargs == {"keep_record": maybe_registered}


def test_without_redis_the_lease_is_left_to_expire(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.parts.leases.release_worker.side_effect = RedisConnectionError("gone")
    bench.lifecycle.start()
    bench.lifecycle.shut_down()
    assert "the lease was not released" in caplog.text


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Give the signals of this process and of Celery back after the test."""
    celery_signals = (worker_init, worker_ready, worker_shutdown)
    receivers, handler = [sent.receivers for sent in celery_signals], signal.getsignal(signal.SIGTERM)
    for sent in celery_signals:
        sent.receivers = []
    yield
    for sent, before in zip(celery_signals, receivers, strict=True):
        sent.receivers = before
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(-1)


def consuming() -> Celery:
    """A Celery app that consumes one queue."""
    celery = Celery("test", set_as_current=False)
    consume(celery, Keys.of("Test"), "m", 4)
    return celery


class Controller:
    """Celery's controller of this process, as far as it is used."""

    pool_cls = "threads"
    options: ClassVar[dict[str, object]] = {}

    def __init__(self, celery: Celery) -> None:
        self.app = celery
        self.concurrency = celery.conf.worker_concurrency

    def __str__(self) -> str:
        return "w@h"

    def setup_logging(self) -> None: ...


@pytest.mark.usefixtures("own_signals")
def test_a_worker_that_cannot_be_built_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    def build(node_name: str) -> Worker:
        raise TimeoutError(f"no driver for {node_name}")

    celery = consuming()
    connect_signals(celery, build)
    with pytest.raises(SystemExit) as ended, caplog.at_level(logging.ERROR):
        worker_init.send(sender=Controller(celery))
    assert ended.value.code == 1
    # the supervisor shows this line
    assert caplog.messages[-1] == "the worker could not be started: TimeoutError: no driver for w@h"


@pytest.mark.usefixtures("own_signals")
def test_a_driver_that_does_not_answer_ends_the_process_for_now(caplog: pytest.LogCaptureFixture) -> None:
    def build(node_name: str) -> Worker:
        raise TemporaryLoadError("nvidia-smi did not answer")

    celery = consuming()
    connect_signals(celery, build)
    with pytest.raises(SystemExit) as ended:
        worker_init.send(sender=Controller(celery))
    assert ended.value.code == EXIT_TEMPORARY
    assert caplog.messages[-1] == "nvidia-smi did not answer; a later start may succeed"


@pytest.mark.usefixtures("own_signals")
def test_a_worker_that_cannot_be_started_or_serve_ends_the_process(bench: Bench) -> None:
    """Celery ignores exceptions of its signals' receivers, and would take requests."""
    bench.parts.registrar.start.side_effect = RuntimeError("can't start new thread")
    celery = consuming()
    connect_signals(celery, lambda name: bench.worker)
    with pytest.raises(SystemExit) as ended:
        worker_init.send(sender=Controller(celery))
    assert ended.value.code == 1

    bench.parts.registrar.start.side_effect = None
    bench.parts.registrar.set_serving.side_effect = RuntimeError("a bug")
    worker_init.send(sender=Controller(celery))
    with pytest.raises(SystemExit) as ended:
        worker_ready.send(sender=None)
    assert ended.value.code == 1
