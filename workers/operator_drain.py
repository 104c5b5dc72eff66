"""Takes this worker out of service while an operator has put it under drain, and back when it is resumed."""

import logging
import threading
from typing import Any

from node.registrar import NoRegistrar, Registrar
from protocol.drains import Drains
from workers.intake import Intake
from workers.status import WorkerStatus

log = logging.getLogger(__name__)


class OperatorDrain:
    """A worker under drain is unregistered from the node, finishes what runs, takes nothing new, and waits.

    `name`: Celery's name of this worker.
    """

    def __init__(
        self,
        drains: Drains,
        name: str,
        status: WorkerStatus,
        registrar: Registrar | NoRegistrar,
        intake: Intake,
    ) -> None:
        self._drains = drains
        self._name = name
        self._status = status
        self._registrar = registrar
        self._intake = intake
        self._lock = threading.Lock()
        self._drained = False
        self._serving = False

    def look(self) -> None:
        """Read the mark and follow it. Raises redis.RedisError; then the worker stays as it is."""
        drained = self._drains.includes(self._name)
        with self._lock:
            if drained != self._drained:
                log.info("an operator has %s this worker", "drained" if drained else "resumed")
                self._drained = drained
                if self._serving:
                    self._registrar.set_serving(not drained)
            if self._serving:
                self._follow()
            self._status.set_drained(drained)

    def serve(self, consumer: Any) -> None:
        """Begin to serve, unless the worker is under drain.

        `consumer`: Celery's, which takes no message before.
        """
        with self._lock:
            self._serving = True
            self._intake.connect(consumer, closed=self._drained)
            self._registrar.set_serving(not self._drained)

    def _follow(self) -> None:
        """Open or close the queue. Repeated with each look: Celery may be without a connection meanwhile."""
        if self._drained:
            self._intake.close()
        elif not self._status.stopping:
            self._intake.open()
