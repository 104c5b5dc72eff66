"""What a worker reports of itself, in its lease's record."""

import threading

import msgspec

from node.registrar import NoRegistrar, Registrar
from protocol.leases import WorkerRecord, WorkerState
from workers.engines.base import Engine
from workers.runner import Runner
from workers.throughput import Throughput


class WorkerStatus:
    """The state of this worker: loading, then ready unless it is draining already.

    `identity`: a record with the fields that never change. `changed` is set when the record has changed.
    """

    def __init__(
        self,
        identity: WorkerRecord,
        engine: Engine,
        runner: Runner,
        registrar: Registrar | NoRegistrar,
        throughput: Throughput,
        changed: threading.Event,
    ) -> None:
        self.identity = identity
        self._engine = engine
        self._runner = runner
        self._registrar = registrar
        self._throughput = throughput
        self._changed = changed
        self._lock = threading.Lock()
        self._state: WorkerState = "loading"
        self._last_error = ""

    def set_ready(self) -> bool:
        """The worker can serve. False if it is draining: then it must not be registered."""
        with self._lock:
            if self._state == "draining":
                return False
            self._state = "ready"
        self._changed.set()
        return True

    def set_draining(self, last_error: str = "") -> None:
        """The worker takes no more requests. `last_error`: why, if something failed."""
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
            state=self._state,
            running=running,
            registered=self._registrar.registered,
            last_error=self._last_error or self._registrar.last_error,
            steps=engine.steps,
            max_model_len=engine.max_model_len,
            slots=self._throughput.slots,
            rate=self._throughput.rate,
        )
