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
from config import EXIT_CONFIGURATION, ConfigurationError, Settings
from supervise.console import Console
from supervise.listeners import FLOWER_ADDRESS, Unavailable
from supervise.plan import make_plan
from supervise.preflight import check
from supervise.readiness import Probe
from supervise.redis_server import EmbeddedRedis
from supervise.reference import help_text
from supervise.service import Service, StartFailed

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
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
        asyncio.run(_run(settings, (arguments.models_file or settings.models_file).absolute()))
    except ConfigurationError as error:
        return _fail(str(error), EXIT_CONFIGURATION)
    except StartFailed as error:
        return _fail(str(error), error.status)
    except Unavailable as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    return 0


async def _run(settings: Settings, models_file: Path) -> None:
    catalogue = Catalogue.from_file(models_file)
    own_redis = not settings.redis_url or "redis_url" not in settings.model_fields_set
    check(settings, catalogue, models_file, own_redis=own_redis)
    probe = Probe(settings)
    with contextlib.ExitStack() as stack:
        redis = None
        if own_redis:
            redis = EmbeddedRedis.prepare(_runtime_folder(settings))
            stack.callback(redis.remove_files)
        plan = make_plan(settings, catalogue, models_file, redis)
        await Service(plan, probe, redis, Console(), _ready_line(settings, probe, redis)).run()


def _runtime_folder(settings: Settings) -> Path:
    """Create the folder for the files of the embedded Redis.

    There is one for each port of BIND, so that two deployments in one checkout use different ones.
    """
    folder = ROOT / ".run" / settings.bind.rpartition(":")[2]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{folder}: {error.strerror}; the embedded Redis keeps its files there"
        ) from error
    return folder


def _ready_line(settings: Settings, probe: Probe, redis: EmbeddedRedis | None) -> str:
    parts = [f"READY {probe.base_url}/v1", f"workers: {probe.base_url}/v1/workers"]
    if settings.flower_basic_auth:
        parts.append(f"Flower: http://{FLOWER_ADDRESS}")
    if redis is not None:
        parts.append(f"REDIS_URL for other terminals: {redis.url_file}")
    return " | ".join(parts)


def _fail(reason: str, status: int) -> int:
    print(f"run: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
