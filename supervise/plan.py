"""Which processes make up the service, each with its command and environment."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, Settings
from supervise.listeners import FLOWER_ADDRESS
from supervise.process import Spec
from supervise.redis_server import EmbeddedRedis

# gunicorn: its worker could not be booted, the application could not be loaded
_GUNICORN_BOOT_FAILED = frozenset({3, 4})
_WORKER_STOP_MARGIN_S = 15.0  # unregistering, and what comes after DRAIN_S
_WEB_STOP_S = 30.0  # above gunicorn's graceful_timeout
_FLOWER_STOP_S = 5.0
_REDIS_STOP_S = 10.0


@dataclass(frozen=True)
class Plan:
    """The processes, in groups that start in this order and stop in the opposite one."""

    redis: tuple[Spec, ...]
    web: tuple[Spec, ...]
    flower: tuple[Spec, ...]
    workers: tuple[Spec, ...]

    @property
    def groups(self) -> tuple[tuple[Spec, ...], ...]:
        # workers leave first, while Redis and web still live: they unregister, and what runs reaches its callers
        return (self.redis, self.web, self.flower, self.workers)


def make_plan(
    settings: Settings, catalogue: Catalogue, models_file: Path, redis: EmbeddedRedis | None
) -> Plan:
    """Everything that runs for this catalogue; `redis` only where the service brings its own."""
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
        orphan_signal=signal.SIGKILL,  # it keeps nothing, and would ask for a Redis that went with it for ever
    )
    return Plan(
        redis=(Spec("redis", redis.argv, env, _REDIS_STOP_S),) if redis else (),
        web=(web,),
        flower=(flower,) if settings.flower_basic_auth else (),
        workers=tuple(_workers(settings, catalogue, env)),
    )


def _workers(settings: Settings, catalogue: Catalogue, env: dict[str, str]) -> Iterator[Spec]:
    names: set[str] = set()
    only_one = sum(len(model.workers or ((),)) for model in catalogue.models) == 1
    for model in catalogue.models:
        for number, gpus in enumerate(model.workers or (None,), start=1):
            name = _unique(f"{slug(model.name)}-{number}", names)
            command = (sys.executable, "-m", "celery", "-q", "-A", "workers", "worker", "-n", f"{name}@%h")
            own = {"WORKER_MODEL": model.name} | _cuda(settings, gpus)
            if not only_one:
                own["WORKER_CID"] = ""  # one cid can't name several workers: each derives its own
            yield Spec(name, command, {**env, **own}, settings.drain_s + _WORKER_STOP_MARGIN_S)


def _cuda(settings: Settings, gpus: tuple[int, ...] | None) -> dict[str, str]:
    """The variable that binds a worker before torch is imported. A list that the operator set is what indices count in."""
    visible = visible_gpus(settings)
    if gpus is None:
        first = visible[0] if visible else ("0" if visible is None else "")
        return {"CUDA_VISIBLE_DEVICES": first}
    chosen = [str(gpu) if visible is None else visible[gpu] for gpu in gpus]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def visible_gpus(settings: Settings) -> list[str] | None:
    """What the operator's own CUDA_VISIBLE_DEVICES lists; None where it is unset."""
    if settings.cuda_visible_devices is None:
        return None
    return [part.strip() for part in settings.cuda_visible_devices.split(",") if part.strip()]


def slug(name: str) -> str:
    """A model's name as a part of a Celery node name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "model"


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "x"
    taken.add(name)
    return name


def child_environment(**own: str) -> dict[str, str]:
    """The supervisor's environment with `own` on top.

    The one place beside config.py that touches the environment: children need PATH, HOME, proxies, HF_HOME and whatever
    else the operator set, unread, and a child's Settings can only be given this way.
    """
    return {**os.environ, **own}  # noqa: TID251
