"""What a worker reports of itself, in its lease's record."""

import threading

import msgspec

from node.registrar import NoRegistrar, Registrar
from protocol.leases import WorkerRecord, WorkerState
from workers.engines.base import Engine
from workers.gpu_watch import GpuWatch
from workers.intake import Intake
from workers.runner import Runner
from workers.throughput import Throughput


class WorkerStatus:
    """The state of this worker: loading, then ready unless it stops or is under drain.

    `identity`: a record with the fields that never change. `changed` is set when the record has changed.
    """

    def __init__(
        self,
        identity: WorkerRecord,
        engine: Engine,
        runner: Runner,
        registrar: Registrar | NoRegistrar,
        throughput: Throughput,
        intake: Intake,
        gpu_watch: GpuWatch,
        changed: threading.Event,
    ) -> None:
        self.identity = identity
        self._engine = engine
        self._runner = runner
        self._registrar = registrar
        self._throughput = throughput
        self._intake = intake
        self._gpu_watch = gpu_watch
        self._changed = changed
        self._lock = threading.Lock()
        self._state: WorkerState = "loading"
        self._drained = False
        self._shown: WorkerState = "loading"
        self._last_error = ""

    def set_ready(self) -> bool:
        """Note that the worker can serve. Returns False if it is stopping: then it must not be registered."""
        with self._lock:
            if self._state == "draining":
                return False
            self._state = "ready"
        self._changed.set()
        return True

    def set_drained(self, drained: bool) -> None:
        """Note whether an operator has put the worker under drain.

        Called again and again, since the state follows later.
        """
        with self._lock:
            self._drained = drained
        state = self._shown_state()
        if state != self._shown:
            self._shown = state
            self._changed.set()

    @property
    def ready(self) -> bool:
        """Whether the worker takes requests."""
        return self._shown_state() == "ready"

    @property
    def stopping(self) -> bool:
        """Whether the process is about to end."""
        return self._state == "draining"

    def set_draining(self, last_error: str = "") -> None:
        """Note that the worker stops, and takes no more requests. `last_error`: why, if something failed."""
        with self._lock:
            self._state = "draining"
            self._last_error = last_error
        self._changed.set()

    def record(self) -> WorkerRecord:
        """The record as it is now."""
        # before the engine's steps: a record with nothing running must count all steps of what ran
        running = len(self._runner.running())
        engine = self._engine.status()
        return msgspec.structs.replace(
            self.identity,
            state=self._shown_state(),
            running=running,
            registered=self._registrar.registered,
            last_error=self._last_error or self._registrar.last_error,
            steps=engine.steps,
            max_model_len=engine.max_model_len,
            takes_images=engine.takes_images,
            slots=self._throughput.slots,
            rate=self._throughput.rate,
            kv_cache_usage=engine.kv_cache_usage,
            gpu=self._gpu_watch.usage,
        )

    def _shown_state(self) -> WorkerState:
        with self._lock:
            state, drained = self._state, self._drained
        if state != "ready" or not drained:
            return state
        return "drained" if self._intake.closed and not self._runner.busy() else "draining"
