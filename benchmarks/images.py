"""Pictures through the whole service beside the bare diffusers call: python -m benchmarks.images

Prints what the service adds to one request (aim: at most 30 ms), and how eight requests at once compare with one after
another (aim: 1.8 times as fast on a GPU, not slower on a CPU). The demo's picture model; steps as given.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image

from tests.deployment import ROOT, Deployment

WEIGHTS = ROOT / "demo" / "models" / "shapes"
RESULTS = ROOT / "benchmarks" / "results"
CATALOGUE = f"""
project = "Benchmark"
[[models]]
name = "shapes"
tasks = ["generation"]
weights = "{WEIGHTS}"
[models.engine]
max_batch_size = 8
torch_threads = 1
"""


def run(rounds: int, steps: int) -> dict[str, float]:
    """Medians over the rounds, in milliseconds and as a ratio; bare and served take turns."""
    torch.set_num_threads(1)
    pipeline = AutoPipelineForText2Image.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder, Deployment(Path(folder), catalogue=CATALOGUE) as service:
        service.start("shapes")

        def ask(seed: int) -> None:
            body = {"model": "shapes", "prompt": "a red circle", "step": steps, "seed": seed}
            status, answer = service.post("/v1/images/generations", body)
            assert status == 200, answer

        def bare(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            pipeline("a red circle", num_inference_steps=steps, generator=generator)

        bare_ms, served_ms, ratios = [], [], []
        with ThreadPoolExecutor(8) as callers:
            bare(0)
            ask(0)
            for _ in range(rounds):
                bare_ms.append(_ms(lambda: bare(1)))
                served_ms.append(_ms(lambda: ask(1)))
                one_by_one = _ms(lambda: list(map(ask, range(8))))
                together = _ms(lambda: list(callers.map(ask, range(8))))
                ratios.append(one_by_one / together)
    return {
        "bare_ms": statistics.median(bare_ms),
        "served_ms": statistics.median(served_ms),
        "on_top_ms": statistics.median(s - b for s, b in zip(served_ms, bare_ms, strict=True)),
        "eight_together_speedup": statistics.median(ratios),
    }


def _ms(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return (time.monotonic() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    figures = run(options.rounds, options.steps)
    for name, value in figures.items():
        print(f"{name:24} {value:10.2f}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "images.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
