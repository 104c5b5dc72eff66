"""The processes that make up the service, each with its command and environment."""

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, Settings
from supervise.listeners import FLOWER_ADDRESS
from supervise.process import Spec
from supervise.redis_server import EmbeddedRedis

_GUNICORN_BOOT_FAILED = frozenset({1, 3, 4})
"""gunicorn's statuses for an address that it can't listen on, a worker that did not start, and an application
that could not be loaded."""
_WORKER_STOP_MARGIN_S = 15.0  # for what a worker does before and after DRAIN_S
_WEB_STOP_S = 30.0  # above gunicorn's graceful_timeout
_FLOWER_STOP_S = 5.0
_REDIS_STOP_S = 10.0


@dataclass(frozen=True)
class Plan:
    """The processes, in groups that start in this order and stop in the reverse order."""

    redis: tuple[Spec, ...]
    web: tuple[Spec, ...]
    flower: tuple[Spec, ...]
    workers: tuple[Spec, ...]

    @property
    def groups(self) -> tuple[tuple[Spec, ...], ...]:
        """The processes in the order in which they start. They stop in the opposite order: workers unregister
        and finish their requests, which needs Redis and the web process.
        """
        return (self.redis, self.web, self.flower, self.workers)


def make_plan(
    settings: Settings, catalogue: Catalogue, models_file: Path, redis: EmbeddedRedis | None
) -> Plan:
    """Make the plan for a catalogue. `redis` is None where the service uses a Redis that already runs."""
    redis_url = redis.url if redis else settings.redis_url
    env = child_environment(REDIS_URL=redis_url, MODELS_FILE=str(models_file), PYTHONUNBUFFERED="1")
    python = (sys.executable, "-m")
    web = Spec(
        "web",
        (*python, "gunicorn", "wsgi:app"),
        env,
        _WEB_STOP_S,
        fatal_at_start=frozenset({EXIT_CONFIGURATION}) | _GUNICORN_BOOT_FAILED,
    )
    host, port = FLOWER_ADDRESS.split(":")
    flower = Spec(
        "flower",
        (*python, "celery", "-q", "-A", "workers", "flower", f"--address={host}", f"--port={port}"),
        env,
        _FLOWER_STOP_S,
        # It has no state, and would try to reach the stopped Redis indefinitely.
        orphan_signal=signal.SIGKILL,
    )
    return Plan(
        redis=(_redis(redis, env),) if redis else (),
        web=(web,),
        flower=(flower,) if settings.flower_basic_auth else (),
        workers=tuple(_workers(settings, catalogue, env)),
    )


def _redis(redis: EmbeddedRedis, env: dict[str, str]) -> Spec:
    # Without Redis every running request fails, so it must stay when all processes get SIGTERM at once.
    return Spec(
        "redis",
        redis.argv,
        env,
        _REDIS_STOP_S,
        orphan_signal=signal.SIGINT,
        stop_signal=signal.SIGINT,
    )


_WITHOUT_EVENTS = ("--without-gossip", "--without-mingle", "--without-heartbeat")
"""What workers tell each other and Flower. Nobody else reads it, and each worker would write every two
seconds."""


def _workers(settings: Settings, catalogue: Catalogue, env: dict[str, str]) -> Iterator[Spec]:
    names: set[str] = set()
    celery: tuple[str, ...] = (sys.executable, "-m", "celery", "-q", "-A", "workers", "worker")
    if not settings.flower_basic_auth:
        celery += _WITHOUT_EVENTS
    only_one = sum(len(model.workers or ((),)) for model in catalogue.models) == 1
    users = Counter(
        gpu
        for model in catalogue.models
        for gpus in model.workers or (None,)
        for gpu in _gpus_of(settings, gpus)
    )
    for model in catalogue.models:
        for number, gpus in enumerate(model.workers or (None,), start=1):
            name = _unique(f"{slug(model.name)}-{number}", names)
            command = (*celery, "-n", f"{name}@%h")
            visible = _gpus_of(settings, gpus)
            own = {
                "WORKER_MODEL": model.name,
                "CUDA_VISIBLE_DEVICES": ",".join(visible),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # that of nvidia-smi; CUDA's own order puts the fastest first
                "WORKER_GPU_SHARE": str(1 / max((users[gpu] for gpu in visible), default=1)),
            }
            if not only_one:
                own["WORKER_CID"] = ""  # one cid can't name several workers, so each makes its own
            yield Spec(name, command, {**env, **own}, settings.drain_s + _WORKER_STOP_MARGIN_S)


def _gpus_of(settings: Settings, gpus: tuple[int, ...] | None) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES lists for a worker.

    Indices count in the operator's own list where there is one.
    """
    visible = visible_gpus(settings)
    if gpus is None:
        return ["0"] if visible is None else visible[:1]
    return [str(gpu) if visible is None else visible[gpu] for gpu in gpus]


def visible_gpus(settings: Settings) -> list[str] | None:
    """Return the items of the operator's CUDA_VISIBLE_DEVICES, None where it is unset."""
    if settings.cuda_visible_devices is None:
        return None
    return [part.strip() for part in settings.cuda_visible_devices.split(",") if part.strip()]


def slug(name: str) -> str:
    """Make a model's name fit for a Celery node name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "model"


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "x"
    taken.add(name)
    return name


def child_environment(**own: str) -> dict[str, str]:
    """Return the supervisor's environment, with the variables in `own` replaced.

    The only place beside config.py that reads the environment: a child needs PATH, HOME, HF_HOME, proxies and
    all else that the operator has set, and its own settings can only be passed this way.
    """
    return {**os.environ, **own}  # noqa: TID251
