"""Finds the GPUs of this worker, from which its cid is made.

Asks the driver and not torch: the lease is taken before torch is imported, and the cid must not depend on
torch.
"""

import shutil
import subprocess

from config import Settings

NVIDIA_SMI_S = 10


def visible_gpus(settings: Settings) -> list[str]:
    """UUIDs of the GPUs in CUDA_VISIBLE_DEVICES, in its order; [] for a worker on the CPU.

    Without the variable a worker takes the first GPU. Raises subprocess.TimeoutExpired if the driver does
    not answer.
    """
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
    """UUIDs of all GPUs of this machine; [] without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []
