"""Checks of the GPUs: the driver by nvidia-smi, and torch in a process of its own, since web never loads
it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.commands.checks.finding import Finding, failed, passed, warned
from catalogue import Catalogue
from config import Settings

NVIDIA_SMI_S = 20
TORCH_S = 180
OLDEST_DRIVER = 580
OLDEST_CAPABILITY = (7, 5)
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
"""Has a folder for each GPU that the kernel's driver drives."""

_ASK_TORCH = """
import json
try:
    import torch
except ModuleNotFoundError:
    print("null")
    raise SystemExit
found = {"version": torch.__version__, "reason": "", "gpus": []}
try:
    torch.cuda.init()
    for index in range(torch.cuda.device_count()):
        torch.ones(2, device=f"cuda:{index}").sum().item()
        found["gpus"].append([torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)])
except Exception as error:
    found["reason"] = str(error).strip().splitlines()[0]
print(json.dumps(found))
"""


def check_gpus(settings: Settings, catalogue: Catalogue) -> Iterator[Finding]:
    """The driver, then torch."""
    if settings.cuda_visible_devices is not None and not settings.cuda_visible_devices.strip():
        yield passed("gpu", "CUDA_VISIBLE_DEVICES is empty: workers run on the CPU")
        yield _check_torch(has_gpu=False)
        return
    driver, count = _check_driver(catalogue)
    yield driver
    yield _check_torch(has_gpu=count > 0)


def _check_driver(catalogue: Catalogue) -> tuple[Finding, int]:
    """The finding, and how many GPUs the driver lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None and not _driver_has_gpus():
        if any(gpus for entry in catalogue.models for gpus in entry.workers or ()):
            return warned("gpu", "the catalogue names GPUs and there are none: workers run on the CPU"), 0
        return passed("gpu", "there is no NVIDIA GPU: workers run on the CPU"), 0
    if tool is None:
        return failed(
            "gpu", "the kernel drives a GPU and there is no nvidia-smi; install the driver's tools"
        ), 0
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return failed("gpu", f"nvidia-smi did not answer within {NVIDIA_SMI_S} s; restart the machine"), 0
    except OSError as error:
        return failed("gpu", f"nvidia-smi can't be run: {error.strerror}"), 0
    if answer.returncode != 0:
        reason = " ".join((answer.stdout + answer.stderr).split())[:200]
        return failed("gpu", f"nvidia-smi ended with status {answer.returncode}: {reason}"), 0
    gpus = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line]
    if not gpus:
        return failed("gpu", "nvidia-smi lists no GPU; look at the kernel's log"), 0
    driver = gpus[0][1]
    shown = f"{len(gpus)} GPUs ({', '.join(sorted({gpu[0] for gpu in gpus}))}), driver {driver}"
    if int(re.sub(r"\D.*", "", driver) or 0) < OLDEST_DRIVER:
        return failed("gpu", f"{shown}: a driver of the {OLDEST_DRIVER} series or newer is needed"), len(gpus)
    return passed("gpu", shown), len(gpus)


def _driver_has_gpus() -> bool:
    return DRIVER_GPUS.is_dir() and any(DRIVER_GPUS.iterdir())


def _check_torch(has_gpu: bool) -> Finding:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return failed("torch", f"torch could not be asked within {TORCH_S} s; look at disk and driver")
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        return failed("torch", f"torch can't be imported: {reason}; run scripts/setup")
    found: dict[str, Any] | None = json.loads(answer.stdout)
    if found is None:
        return warned("torch", "torch is not installed here: workers run on other machines only")
    version = f"torch {found['version']}"
    if not has_gpu:
        return passed("torch", f"{version} can be imported")
    if found["reason"] or not found["gpus"]:
        why = found["reason"] or "it sees none"
        return failed("torch", f"{version} can't use the GPU: {why}; see GPUs in docs/operations.md")
    old = [name for name, *capability in found["gpus"] if tuple(capability) < OLDEST_CAPABILITY]
    if old:
        return failed("torch", f"{version} has no kernels for {', '.join(old)}: 7.5 or later is needed")
    return passed("torch", f"{version} computes on {len(found['gpus'])} GPUs")
