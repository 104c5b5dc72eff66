"""Where an engine computes: the GPU that the driver gives this process, or the CPU."""

import os
import re

import torch

from workers.engines.base import EngineLoadError, TemporaryLoadError


def choose_device() -> torch.device:
    """Return the GPU if torch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision() -> torch.dtype:
    """Return the GPU's 16-bit dtype: float16 before compute capability 8.0, which has no bfloat16 units."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def default_threads() -> int:
    """Return the CPU threads of torch for an engine whose catalogue entry names none."""
    if torch.cuda.is_available():
        return torch.get_num_threads()
    # web, Redis and other threads need a core: an engine on all cores waits for them at every barrier
    return max(1, available_cores() - 1)


def require_gpus(gpus: list[str]) -> None:
    """Raise EngineLoadError unless this process can use the GPUs that the driver gives it, `gpus`.

    Without this check a model would be served by the CPU, or by the first GPU alone, and nobody would be
    told.
    """
    if not gpus:
        return
    if len(gpus) > 1:
        raise EngineLoadError(
            f"this worker has {len(gpus)} GPUs, and its engine uses one; list each in a worker of its own"
        )
    if torch.version.cuda is None:
        raise EngineLoadError(
            f"this machine has a GPU, and torch {torch.__version__} is a build for the CPU; install the build for"
            " CUDA, or let the worker have no GPU (workers = [[]])"
        )
    if not torch.cuda.is_available():
        reason = _reason()
        # an old driver stays old; a device that is lost or reset may come back
        kind = EngineLoadError if "too old" in reason else TemporaryLoadError
        raise kind(f"torch can't use the GPU that the driver lists: {reason}")
    _require_kernels(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _reason() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:300]
    return "it finds none"


def _require_kernels(name: str, capability: tuple[int, int]) -> None:
    """Raise EngineLoadError if this build of torch has no code for a GPU of this compute capability."""
    built = torch.cuda.get_arch_list()
    if not any(_runs_on(capability, entry) for entry in built):
        raise EngineLoadError(
            f"torch {torch.__version__} has no kernels for {name}, of compute capability"
            f" {capability[0]}.{capability[1]}; it was built for {', '.join(built)}"
        )


def _runs_on(capability: tuple[int, int], entry: str) -> bool:
    """Whether code built for `entry`, such as sm_80, sm_90a or compute_120, runs on this capability."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
    if match is None:
        return False
    kind, major, minor, specific = match.groups()
    version = int(major), int(minor)
    if specific == "a":
        return version == capability
    # machine code, and PTX for one family, run on later minor versions; other PTX on all later ones
    within_major = kind == "sm" or specific == "f"
    return version <= capability and (not within_major or version[0] == capability[0])
