"""Lets Celery's signals drive the life of a worker. In the threads pool they fire in the worker's one process
(docs/adr/0001-threads-pool.md).
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.signals import worker_init, worker_ready, worker_shutdown

from config import EXIT_CONFIGURATION, EXIT_TEMPORARY, ConfigurationError
from protocol.names import GENERATE_TASK
from workers.buffered_log import buffer_lines
from workers.control import check_options, install_controls, stop_at_hangup
from workers.engines.base import TemporaryLoadError
from workers.job_log import log as job_log
from workers.json_logs import format_handlers
from workers.lifecycle import Lifecycle
from workers.services import Worker
from workers.stop_signal import StopSignal

log = logging.getLogger(__name__)


def connect_signals(celery: Celery, build: Callable[[str], Worker], *, json_logs: bool = False) -> None:
    """Let Celery's signals start and stop the worker that `build` makes for Celery's name of this process."""

    def on_init(sender: Any, **_: object) -> None:
        # Celery does this after the signal, too late for what is logged while the model is loaded
        sender.setup_logging()
        buffer_lines(job_log)
        if json_logs:
            format_handlers(str(sender))
        # until Celery installs its handler SIGTERM would end the process with its lease unreleased
        signal.signal(signal.SIGTERM, lambda *_: None)
        stop_at_hangup()
        stop = StopSignal()
        with _fatal("the worker could not be started"):
            conf = celery.conf
            check_options(sender, queue=conf.task_default_queue, slots=conf.worker_concurrency)
            worker = build(str(sender))
            install_controls(worker.runner.revoke)
            lifecycle = Lifecycle(worker, stop)

            def on_ready(sender: Any, **_: object) -> None:
                with _fatal("the worker could not begin to serve"):
                    # Celery has installed a handler of its own meanwhile
                    stop_at_hangup()
                    lifecycle.serve(sender)

            # weak=False: Celery would drop functions to which nothing else refers
            worker_ready.connect(on_ready, weak=False)
            worker_shutdown.connect(lambda **_: end(lifecycle), weak=False)

            def generate(request_id: str) -> None:
                worker.runner.run(request_id)

            celery.task(name=GENERATE_TASK)(generate)
            lifecycle.start()

    def end(lifecycle: Lifecycle) -> None:
        lifecycle.shut_down()
        # Python takes its handlers away while it exits, and a late SIGTERM would then be its exit status
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    worker_init.connect(on_init, weak=False)


@contextmanager
def _fatal(what: str) -> Iterator[None]:
    """End the process after an exception: of a signal's receivers Celery ignores all but SystemExit.

    It would then take requests that it can't serve.
    """
    try:
        yield
    except ConfigurationError as error:
        log.critical("%s", error)
        raise SystemExit(EXIT_CONFIGURATION) from error
    except TemporaryLoadError as error:
        log.critical("%s; a later start may succeed", error)
        raise SystemExit(EXIT_TEMPORARY) from error
    except Exception as error:
        log.exception("%s", what)
        log.critical("%s: %s: %s", what, type(error).__name__, error)
        raise SystemExit(1) from error
