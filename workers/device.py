"""Finds the GPUs of this worker, from which its cid is made.

Asks the driver and not torch: the lease is taken before torch is imported, and the cid must not depend on
torch.
"""

import shutil
import subprocess
from pathlib import Path

from config import Settings
from workers.engines.base import TemporaryLoadError

NVIDIA_SMI_S = 10
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
"""Has a folder for each GPU that the kernel's driver drives."""


def visible_gpus(settings: Settings) -> list[str]:
    """UUIDs of the GPUs in CUDA_VISIBLE_DEVICES, in its order; [] for a worker on the CPU.

    Without the variable a worker takes the first GPU. Raises TemporaryLoadError if the driver does not
    answer: the worker must not serve its model on the CPU instead.
    """
    if settings.cuda_visible_devices is not None and not settings.cuda_visible_devices.strip():
        return []
    installed = _installed_gpus()
    if settings.cuda_visible_devices is None:
        return installed[:1]
    found = []
    for item in filter(None, (part.strip() for part in settings.cuda_visible_devices.split(","))):
        if item.isdigit():
            if int(item) >= len(installed):
                # CUDA ignores this item and all after it
                break
            found.append(installed[int(item)])
        else:
            found += [uuid for uuid in installed if uuid.startswith(item)]
    return found


def _installed_gpus() -> list[str]:
    """UUIDs of all GPUs of this machine; [] without a driver. Raises TemporaryLoadError."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TemporaryLoadError(f"nvidia-smi did not answer within {NVIDIA_SMI_S} s") from error
    if answer.returncode == 0:
        return answer.stdout.split()
    if DRIVER_GPUS.is_dir() and any(DRIVER_GPUS.iterdir()):
        reason = " ".join((answer.stdout + answer.stderr).split())[:300]
        raise TemporaryLoadError(f"nvidia-smi ended with status {answer.returncode}: {reason}")
    return []
