"""Checks before anything is started. Each raises an error of one line that says what is wrong and where."""

from pathlib import Path

from catalogue import Catalogue, ModelEntry
from config import ConfigurationError, Settings
from protocol.redis_check import RedisUnavailable, check_redis
from supervise.listeners import Unavailable, check_free
from supervise.plan import visible_gpus

_ECHO = "echo:"  # the engine of tests and benchmarks, which has no weights
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def check(settings: Settings, catalogue: Catalogue, models_file: Path, *, own_redis: bool) -> None:
    """Check weights, GPUs, addresses and, unless it is the embedded one, Redis.

    Raises ConfigurationError or Unavailable.
    """
    for model in catalogue.models:
        _check_weights(model, models_file)
        _check_gpus(model, settings, models_file)
    check_free(settings)
    if not own_redis:
        try:
            check_redis(settings.redis_url, settings.namespace or catalogue.project)
        except RedisUnavailable as error:
            raise Unavailable(str(error)) from error


def _check_weights(model: ModelEntry, models_file: Path) -> None:
    if model.weights.startswith(_ECHO):
        return
    folder = Path(model.weights).expanduser()
    where = f"{models_file}: weights of {model.name!r}"
    if folder.is_dir():
        if (wanted := model.lacks(folder)) is not None:
            raise ConfigurationError(f"{where}: the folder {model.weights} has no {wanted}")
    elif folder.exists():
        raise ConfigurationError(f"{where}: {model.weights} is a file; weights must be a folder or a hub id")
    elif folder.is_absolute():
        raise Unavailable(f"{where}: there is no folder {model.weights}")  # its disk may not be mounted yet
    elif model.weights_folder is not None:
        raise ConfigurationError(
            f"{where}: there is no folder {model.weights}; a hub id would look like owner/name"
        )


def _check_gpus(model: ModelEntry, settings: Settings, models_file: Path) -> None:
    for gpus in model.workers or ():
        if len(gpus) > 1:
            alone = ", ".join(f"[{gpu}]" for gpu in gpus)
            raise ConfigurationError(
                f"{models_file}: workers of {model.name!r}: {list(gpus)} gives one worker {len(gpus)} GPUs, and the"
                f" engines use one; write {alone} for a worker on each"
            )
    visible = visible_gpus(settings)
    if visible is not None:
        count, which = len(visible), f"CUDA_VISIBLE_DEVICES={','.join(visible)} lists"
    elif _NVIDIA_GPUS.is_dir():
        count, which = len(list(_NVIDIA_GPUS.iterdir())), "this machine has"
    else:
        return  # there is no GPU, and workers run on the CPU
    for gpu in (gpu for gpus in model.workers or () for gpu in gpus):
        if not 0 <= gpu < count:
            raise ConfigurationError(
                f"{models_file}: workers of {model.name!r}: GPU {gpu} does not exist, {which} {count}"
            )
