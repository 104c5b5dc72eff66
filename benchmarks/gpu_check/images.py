"""Checks that the image engine draws on this device."""

import time
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.models import GIB, random_images
from benchmarks.gpu_check.report import Outcome, Skipped, judged
from benchmarks.gpu_check.streams import Recorder
from protocol.events import Failed, ImageReady
from protocol.jobs import ImageJob
from workers.engines.images import ImageEngine

GPU_STEPS, CPU_STEPS = 20, 2
LARGEST_DIFFERENCE = 2.0
"""Of two images of one seed: the mean over all pixels, of 255."""


def image(context: Context) -> Outcome:
    """One image of the model's own size, twice with one seed: it must be an image, and the same one."""
    entry = context.target.image
    if entry is None:
        if context.target.chat is not None:
            raise Skipped("no image model was given")
        entry = random_images(context.folder, context.device)
    if "generation" not in entry.tasks:
        raise Skipped(f"{entry.name} only edits")
    on_gpu, recorder = context.device.type == "cuda", Recorder()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    steps = GPU_STEPS if on_gpu else CPU_STEPS
    engine = ImageEngine(entry)
    engine.load(recorder)
    try:
        found = [_draw(engine, recorder, entry.name, steps) for _ in range(2)]
    finally:
        engine.close()
    (first, _), (again, seconds) = found
    height, width, _ = first.shape
    difference = float(np.abs(first - again).mean())
    flat = first.min() == first.max()
    figure = f"{entry.name}: {width} x {height}, {steps} steps in {seconds:.2f} s"
    values = {"seconds": seconds, "steps": steps, "width": width, "height": height, "difference": difference}
    if on_gpu:
        peak = torch.cuda.max_memory_reserved(context.device)
        figure, values = f"{figure}, {peak / GIB:.1f} GiB at the peak", values | {"peak_bytes": peak}
    if flat:
        figure += "; all pixels are alike"
    if difference > LARGEST_DIFFERENCE:
        figure += f"; the same seed gave another image, by {difference:.1f} of 255"
    return judged(not flat and difference <= LARGEST_DIFFERENCE, figure, **values)


def _draw(engine: ImageEngine, recorder: Recorder, model: str, steps: int) -> tuple[np.ndarray, float]:
    """Return an image as float64 [height, width, 3] and the seconds that it took."""
    request_id, started = recorder.new_id(), time.perf_counter()
    job = ImageJob(
        id=request_id,
        model=model,
        task="generation",
        prompt="a red circle",
        seed=7,
        num_inference_steps=steps,
    )
    engine.submit(job)
    recorder.wait_ended(engine, [request_id])
    seconds = time.perf_counter() - started
    ended = recorder.ended[request_id]
    if isinstance(ended, Failed):
        raise RuntimeError(f"the image failed: {ended.message}")
    (ready,) = (event for event in recorder.others[request_id] if isinstance(event, ImageReady))
    return np.asarray(Image.open(BytesIO(ready.png)).convert("RGB"), np.float64), seconds
