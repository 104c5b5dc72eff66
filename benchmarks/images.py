"""Compares image generation through the whole service with a plain diffusers call: python -m
benchmarks.images

Uses the demo image model. Prints the time that the service adds to one request (goal: at most 30 ms), and the
speed of eight concurrent requests relative to eight in sequence (goal: 1.8 on a GPU, at least 1 on a CPU).
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
    """Return medians over the rounds. diffusers and the service take turns in each round."""
    torch.set_num_threads(1)
    pipeline = AutoPipelineForText2Image.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder, Deployment(Path(folder), catalogue=CATALOGUE) as service:
        service.start("shapes")

        def ask(seed: int) -> None:
            body = {"model": "shapes", "prompt": "a red circle", "step": steps, "seed": seed}
            status, answer = service.post("/v1/images/generations", body)
            assert status == 200, answer

        def call_diffusers(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            pipeline("a red circle", num_inference_steps=steps, generator=generator)

        diffusers_ms, service_ms, ratios = [], [], []
        with ThreadPoolExecutor(8) as clients:
            call_diffusers(0)
            ask(0)
            for _ in range(rounds):
                diffusers_ms.append(_ms(lambda: call_diffusers(1)))
                service_ms.append(_ms(lambda: ask(1)))
                in_sequence = _ms(lambda: list(map(ask, range(8))))
                concurrent = _ms(lambda: list(clients.map(ask, range(8))))
                ratios.append(in_sequence / concurrent)
    return {
        "diffusers_ms": statistics.median(diffusers_ms),
        "service_ms": statistics.median(service_ms),
        "overhead_ms": statistics.median(s - d for s, d in zip(service_ms, diffusers_ms, strict=True)),
        "speedup_of_8_concurrent": statistics.median(ratios),
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
