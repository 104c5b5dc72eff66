"""Which GPUs are this worker's, and the name (`cid`) that follows from them. Asks the driver, never torch: the lease must
stand before torch is imported, and a name must not depend on what torch sees."""

import shutil
import subprocess

from config import Settings

NVIDIA_SMI_S = 10


def visible_gpus(settings: Settings) -> list[str]:
    """UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves this process, in its order; [] for a worker on the CPU.

    Without the variable a worker takes the first GPU alone.
    """
    installed = _installed_gpus()
    if settings.cuda_visible_devices is None:
        return installed[:1]
    found = []
    for item in filter(None, (part.strip() for part in settings.cuda_visible_devices.split(","))):
        if item.isdigit():
            if int(item) >= len(installed):
                # CUDA ignores this entry and all after it
                break
            found.append(installed[int(item)])
        else:
            found += [uuid for uuid in installed if uuid.startswith(item)]
    return found


def _installed_gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []
