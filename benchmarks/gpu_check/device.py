"""Checks of the device alone: driver, compute capability, and whether torch can compute on it."""

import shutil
import subprocess

import torch

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.report import Outcome, Skipped, judged
from config import Settings
from workers.device import visible_gpus
from workers.engines.device import half_precision, require_gpus

NVIDIA_SMI_S = 30


def driver(context: Context) -> Outcome:
    """The driver, and whether torch can use the GPU that it lists. Raises EngineLoadError if not."""
    gpus = visible_gpus(Settings.from_env())
    if not gpus and context.device.type == "cpu":
        raise Skipped("the driver gives this process no GPU: everything runs on the CPU")
    # an engine takes the first one
    require_gpus(gpus[:1])
    name, version = torch.cuda.get_device_name(context.device), _driver_version()
    figure = f"{name}, driver {version}, torch {torch.__version__} (CUDA {torch.version.cuda})"
    return judged(True, figure, name=name, driver=version, torch=torch.__version__, cuda=torch.version.cuda)


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
    return answer.stdout.split()[0]


def capability(context: Context) -> Outcome:
    """The compute capability, and the memory."""
    context.require_gpu()
    properties = torch.cuda.get_device_properties(context.device)
    figure = (
        f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors,"
        f" {properties.total_memory / 2**30:.1f} GiB"
    )
    return judged(
        True,
        figure,
        capability=[properties.major, properties.minor],
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )


def kernels(context: Context) -> Outcome:
    """Whether a product of matrices in half precision is right: torch's kernels run on this GPU."""
    context.require_gpu()
    built, dtype = torch.cuda.get_arch_list(), half_precision()
    # whole numbers up to 256, which both dtypes hold exactly
    left = torch.arange(64 * 64, device=context.device).remainder(3).view(64, 64)
    found = (left.to(dtype) @ left.to(dtype)).cpu()
    right = torch.equal(found.long(), left.cpu() @ left.cpu())
    words = "right" if right else "WRONG"
    figure = f"a product in {str(dtype).removeprefix('torch.')} is {words}; torch has {' '.join(built)}"
    return judged(right, figure, built_for=built)
