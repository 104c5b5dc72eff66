"""The command line of the supervisor: `python -m supervise [MODELS_FILE]`.

The exit status is 0 after a stop that was requested, EXIT_CONFIGURATION for a configuration error, 1 for a
failure that may pass, and 130 for a Ctrl-C before anything was started.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, ConfigurationError, Settings, json_logs_wanted
from logs import json_line
from protocol.alarms import Alarms
from protocol.connections import connect_redis, namespace_of
from protocol.names import Keys
from supervise.console import SUPERVISOR, Console, LineWriter
from supervise.listeners import FLOWER_ADDRESS, Unavailable
from supervise.plan import Plan, make_plan
from supervise.preflight import check
from supervise.readiness import Probe
from supervise.redis_server import EmbeddedRedis
from supervise.reference import help_text
from supervise.runtime_folder import runtime_folder
from supervise.service import Service, StartFailed

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the service. Returns the exit status."""
    # An argument or a folder may have letters that the output's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # typed as any TextIO
    parser = argparse.ArgumentParser(
        prog="scripts/run",
        description="Run the whole service in the foreground. Ctrl-C stops it in order, twice: in seconds.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models_file", nargs="?", type=Path, help="the catalogue (default: MODELS_FILE, else models.toml)"
    )
    arguments = parser.parse_args()
    try:
        settings = Settings.from_env()
        _run(settings, (arguments.models_file or settings.models_file).absolute())
    except ConfigurationError as error:
        return _fail(str(error), EXIT_CONFIGURATION)
    except StartFailed as error:
        return _fail(str(error), error.status)
    except Unavailable as error:
        return _fail(str(error), 1)
    return 0


def _run(settings: Settings, models_file: Path) -> None:
    catalogue = Catalogue.from_file(models_file)
    own_redis = "redis_url" not in settings.model_fields_set
    probe = Probe(settings)
    with contextlib.ExitStack() as stack:
        # first, since the checks would find the ports of a service that is still starting free
        folder = stack.enter_context(runtime_folder(ROOT / ".run", probe.port))
        check(settings, catalogue, models_file, own_redis=own_redis)
        redis = None
        if own_redis:
            redis = EmbeddedRedis.prepare(folder)
            stack.callback(redis.remove_files)
        plan = make_plan(settings, catalogue, models_file, redis)
        alarms = _alarms(settings, catalogue, redis)
        console = Console(as_json=settings.json_logs)
        ready_line = _ready_line(settings, probe, redis)
        asyncio.run(_serve(plan, probe, redis, console, ready_line, alarms))


async def _serve(
    plan: Plan, probe: Probe, redis: EmbeddedRedis | None, console: Console, ready_line: str, alarms: Alarms
) -> None:
    try:
        await Service(plan, probe, redis, console, ready_line, alarms.renew).run()
    finally:
        console.close()


def _alarms(settings: Settings, catalogue: Catalogue, redis: EmbeddedRedis | None) -> Alarms:
    own = settings if redis is None else settings.model_copy(update={"redis_url": redis.url})
    return Alarms(connect_redis(own), Keys.of(namespace_of(settings, catalogue)))


def _ready_line(settings: Settings, probe: Probe, redis: EmbeddedRedis | None) -> str:
    parts = [f"READY {probe.base_url}/v1", f"workers: {probe.base_url}/v1/workers"]
    if settings.flower_basic_auth:
        parts.append(f"Flower: http://{FLOWER_ADDRESS}")
    if redis is not None:
        parts.append(f"REDIS_URL for other terminals: {redis.url_file}")
    return " | ".join(parts)


def _fail(reason: str, status: int) -> int:
    # A reader that has stalled must not keep the process from ending.
    stderr = LineWriter(2, sys.stderr.encoding)
    stderr.write(json_line(SUPERVISOR, reason, "CRITICAL") if json_logs_wanted() else f"run: {reason}")
    stderr.close(timeout_s=2.0)
    return status
