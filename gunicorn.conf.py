"""gunicorn's settings. `gunicorn wsgi:app` reads this file from the working directory."""

import ctypes
import gc
import resource
import signal
import sys
from typing import Any

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, ConfigurationError, Settings, json_logs_wanted
from logs import print_failure

try:
    _settings = Settings.from_env()
    # here too, because gunicorn reports every exception of the application as status 3, with a traceback
    Catalogue.from_file(_settings.models_file)
except ConfigurationError as error:
    print_failure("web", str(error), as_json=json_logs_wanted())
    sys.exit(EXIT_CONFIGURATION)

bind = [_settings.bind]
if _settings.api_keys:
    # The network node can't send a key, so it has its own listener with only the endpoints that it calls.
    bind.append(_settings.node_bind)

# Each open stream needs a descriptor, and the soft limit is 1024 on many systems.
_, _open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
if _open_files != resource.RLIM_INFINITY:  # macOS has no number there, and refuses it as a soft limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (_open_files, _open_files))

workers = _settings.web_concurrency  # processes; they share only the listeners and Redis
worker_class = "gunicorn_worker.Worker"
worker_connections = 4096  # open connections of a process; each takes about 15 KiB
preload_app = False  # the application must be imported after gevent has patched the standard library
max_requests = 0  # replacing a process would end its streams
keepalive = (
    95  # seconds; the node keeps idle connections for 90 s and does not retry on one that was closed here
)
timeout = 30  # seconds without a heartbeat of the event loop after which the master replaces the process
graceful_timeout = 27  # seconds from SIGTERM to SIGKILL; streams end by themselves before that
forwarder_headers = ""  # no header of a peer may set SCRIPT_NAME or PATH_INFO
control_socket_disable = True  # gunicorn would create one in the home directory
accesslog = None
errorlog = "-"
loglevel = "info"
if _settings.json_logs:
    logger_class = "gunicorn_worker.JsonLogger"


def post_fork(server: Any, worker: Any) -> None:
    """Let SIGTERM end a process that is still importing, and set what malloc returns to the system.

    Until the worker installs its own handlers it has the master's, which would lose the signal: the master
    would then wait for `graceful_timeout`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _return_large_blocks()


_M_MMAP_THRESHOLD = -3  # malloc.h of glibc; other C libraries have no mallopt


def _return_large_blocks() -> None:
    """Make malloc return each block of a MiB or more to the system when it is freed.

    By itself glibc raises that limit, up to 32 MiB, with each large block that is freed. Later bodies are
    then parts of the heap, which shrinks at its end only: after a dozen uploads a process kept a hundred MiB
    and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def post_worker_init(worker: Any) -> None:
    """Start the application's threads. It ends its streams when `worker.alive` becomes false."""
    worker.wsgi.extensions["modelservice"].start(worker)
    # What is in memory now stays there; a full collection between two tokens would scan all of it.
    gc.collect()
    gc.freeze()


def worker_exit(server: Any, worker: Any) -> None:
    """Release the leases of this process, instead of letting them expire."""
    if getattr(worker, "wsgi", None) is not None:
        worker.wsgi.extensions["modelservice"].stop()
