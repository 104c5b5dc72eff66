"""What Celery's command line, its remote control and Flower's buttons may do to a worker.

A worker's pool, queue and limits follow from the catalogue. A change of them would leave it registered with
the node while it serves less than it says, or nothing.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from celery.worker.control import Panel

from config import ConfigurationError

THREADS_POOL = ("threads", "celery.concurrency.thread")
REFUSED = (
    *("add_consumer", "cancel_consumer", "rate_limit", "time_limit"),
    *("pool_grow", "pool_shrink", "pool_restart", "autoscale", "revoke_by_stamped_headers"),
)


def check_options(controller: Any, *, queue: str, slots: int) -> None:
    """Check the options of the command line. `controller`: Celery's, at `worker_init`.

    Raises ConfigurationError.
    """
    pool = controller.pool_cls
    if (pool if isinstance(pool, str) else pool.__module__) not in THREADS_POOL:
        raise ConfigurationError("the worker needs Celery's threads pool, its default: leave --pool out")
    if controller.options.get("autoscale") or controller.concurrency != slots:
        raise ConfigurationError(
            f"the worker takes {slots} requests at a time, which is max_batch_size of its model: leave --concurrency"
            " and --autoscale out"
        )
    if list(controller.app.amqp.queues.consume_from) != [queue]:
        raise ConfigurationError(f"the worker consumes the queue {queue!r} of its model: leave --queues out")


def install_controls(revoke: Callable[[str], None]) -> None:
    """Replace the remote controls that would bypass the worker's life, and refuse those that can't work.

    `revoke` ends a request of this process or of its queue, and answers its client.
    """

    def shut_down(state: Any, **_: object) -> dict[str, str]:
        # the way of SIGTERM: unregister, finish what runs, exit
        os.kill(os.getpid(), signal.SIGTERM)
        return {"ok": "the worker finishes its requests and stops"}

    def end(state: Any, task_id: str | list[str], **_: object) -> dict[str, str]:
        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        # in threads, because Redis may have to be waited for, and Celery's loop must go on
        for each in ids:
            threading.Thread(target=revoke, args=(each,), name="revoke", daemon=True).start()
        return {"ok": f"{len(ids)} requests are cancelled where this worker has them"}

    def refuse(state: Any, **_: object) -> dict[str, str]:
        return {"error": "this follows from the catalogue; change it there and restart the worker"}

    controls: dict[str, Callable[..., dict[str, str]]] = {
        "shutdown": shut_down,
        "revoke": end,
        "terminate": end,
    }
    Panel.data.update(controls | dict.fromkeys(REFUSED, refuse))


def stop_at_hangup() -> None:
    """Let SIGHUP stop the worker as SIGTERM does; Celery would start a new process in its place, without a
    drain.

    A process that ignores SIGHUP (nohup) goes on ignoring it.
    """
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
