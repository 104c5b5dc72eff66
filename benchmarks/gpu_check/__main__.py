"""Checks the engines on this machine's GPU: python -m benchmarks.gpu_check [CATALOGUE or FOLDER]

Writes a line for each check and a file of all figures. Ends with status 1 if any check failed. Without a GPU
it runs on the CPU and skips what needs one.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.gpu_check import chat, device, images, load, rows
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.models import read_target
from benchmarks.gpu_check.report import Outcome, Report
from config import ConfigurationError

RESULTS = Path(__file__).parent.parent / "results"
STREAMS = (1, 16, 64, 256)

Check = Callable[[Context], Outcome]

CHECKS: dict[str, Check] = {
    "driver": device.driver,
    "compute capability": device.capability,
    "torch's kernels": device.kernels,
    "reference": chat.reference,
    "load": chat.load,
    "dtype": chat.dtype,
    "attention": chat.attention,
    "CUDA graphs": chat.graphs,
    "KV cache": chat.kv_cache,
    "rows together": rows.rows_together,
    "greedy": chat.greedy,
    "waits for the device": load.waits,
    **{f"{count} streams": partial(load.speed, count=count) for count in STREAMS},
    "peak memory": load.peak_memory,
    "out of memory": load.out_of_memory,
}
"""Of the chat model, in this order: each may use what earlier ones have left in the context."""

LATER_CHECKS: dict[str, Check] = {"greedy in float32": chat.greedy_in_float32, "image": images.image}
"""These load models of their own, after the chat model has left the device."""


def run_checks(context: Context, report: Report) -> None:
    """Run all checks."""
    for name, check in CHECKS.items():
        report.run(name, partial(check, context))
    context.close()
    for name, check in LATER_CHECKS.items():
        report.run(name, partial(check, context))


def device_name() -> str:
    """The name of the device, with which the file's name ends: "nvidia-h200", "cpu"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument(
        "target", nargs="?", type=Path, help="a catalogue, or a folder of weights. Default: random models"
    )
    parser.add_argument("--model", help="the catalogue's model to check. Default: the first of each kind")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the file of results")
    options = parser.parse_args()
    try:
        target = read_target(options.target, options.model)
    except ConfigurationError as error:
        parser.error(str(error))
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    report = Report(partial(print, flush=True))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        context = Context(target, Path(folder))
        run_checks(context, report)
    path = options.results / f"gpu-check-{device_name()}.json"
    report.write(path, device=device_name(), model=context.model_name, work=context.work._asdict())
    print(f"written to {path}")
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
