"""Compares chat through the whole service with two others: python -m benchmarks.chat

The others are `transformers serve --continuous-batching`, and `model.generate` on a static batch in this
process, which has neither server nor client. All use the same model (benchmarks/random_model.py), the same
prompts of 40 tokens, 128 new tokens, greedy, no early stop; both servers have the same client. The three take
turns within each round, because the speed of a shared machine changes; ratios are taken within a round, and
the result is the median round. Writes benchmarks/results/chat.json and chat.png.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_model import prompts, write_model
from benchmarks.stream_client import chat_request, percentile, run_streams
from tests.deployment import ROOT, Deployment, free_port, wait_until

NEW_TOKENS = 128
CONCURRENCIES = (1, 16, 64)
OURS, PEER, STATIC = "this service", "transformers serve (continuous batching)", "static batch, no server"
RESULTS = ROOT / "benchmarks" / "results"

Measure = Callable[[int], dict[str, float]]
"""Takes the concurrency; returns tokens_per_s and, for servers, ttft_ms (p50)."""


def measure_server(port: int, model: str, concurrency: int) -> dict[str, float]:
    """Measure one burst of streamed chats."""
    requests = [
        chat_request(
            f"127.0.0.1:{port}",
            {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            },
        )
        for prompt in prompts(concurrency)
    ]
    results = run_streams(port, requests)
    short = [result.tokens for result in results if result.tokens < NEW_TOKENS * 0.9]
    assert not short, f"streams ended early: {short}"
    seconds = max(result.ended_at for result in results) - min(result.sent_at for result in results)
    first = [(result.first_token_at - result.sent_at) * 1000 for result in results]
    return {"tokens_per_s": concurrency * NEW_TOKENS / seconds, "ttft_ms": percentile(first, 0.5)}


@contextmanager
def ours(folder: Path, weights: Path, threads: int) -> Iterator[Measure]:
    """Run this service: gunicorn, one worker, Redis."""
    catalogue = f"""
project = "Benchmark"
[[models]]
name = "random"
tasks = ["chat"]
weights = "{weights}"
[models.engine]
max_batch_size = 64
torch_threads = {threads}
prefix_cache = false
"""
    with Deployment(folder, catalogue=catalogue) as service:
        service.start("random")
        yield lambda concurrency: measure_server(service.port, "random", concurrency)


@contextmanager
def peer(folder: Path, weights: Path) -> Iterator[Measure]:
    """Run transformers' own server with its defaults."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(weights)]
    command += ["--continuous-batching", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "peer.log").read_text()[-3000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        wait_until(answers, timeout_s=120, what="transformers serve answers")
        yield lambda concurrency: measure_server(port, str(weights), concurrency)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def static_batch(weights: Path) -> Iterator[Measure]:
    """Run `generate` on one padded batch, with all of torch's threads."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights)

    def measure(concurrency: int) -> dict[str, float]:
        batch = tokenizer(prompts(concurrency), return_tensors="pt", padding=True)
        began = time.monotonic()
        with torch.inference_mode():
            model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )
        return {"tokens_per_s": concurrency * NEW_TOKENS / (time.monotonic() - began)}

    yield measure


def run(rounds: int, threads: int) -> dict[str, Any]:
    """Run all rounds. The figures are listed by contender and concurrency, one for each round."""
    figures: dict[str, dict[int, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = folder / "model"
        write_model(weights)
        contenders: dict[str, Measure] = {
            OURS: stack.enter_context(ours(folder / "ours", weights, threads)),
            PEER: stack.enter_context(peer(folder, weights)),
            STATIC: stack.enter_context(static_batch(weights)),
        }
        for name, measure in contenders.items():
            figures[name] = {concurrency: [] for concurrency in CONCURRENCIES}
            for concurrency in CONCURRENCIES:
                measure(concurrency)
        for _ in range(rounds):
            for concurrency in CONCURRENCIES:
                for name, measure in contenders.items():
                    figures[name][concurrency].append(measure(concurrency))
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "new_tokens": NEW_TOKENS,
        "torch_threads_of_ours": threads,
        "figures": figures,
    }


def ratios(figures: dict[str, Any], other: str) -> dict[int, float]:
    """Return our tokens/s divided by the other's, as the median over the rounds, by concurrency."""
    found = {}
    for concurrency in CONCURRENCIES:
        pairs = zip(figures[OURS][concurrency], figures[other][concurrency], strict=True)
        found[concurrency] = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
    return found


def report(result: dict[str, Any]) -> None:
    """Print the table and the ratios."""
    figures = result["figures"]
    print(f"{result['machine']}, torch {result['torch']}; tokens/s (first token, ms p50)")
    for name, rows in figures.items():
        cells = []
        for concurrency in CONCURRENCIES:
            speed = statistics.median(row["tokens_per_s"] for row in rows[concurrency])
            first = [row["ttft_ms"] for row in rows[concurrency] if "ttft_ms" in row]
            cells.append(f"{speed:8.0f}" + (f" ({statistics.median(first):5.0f})" if first else " " * 8))
        print(f"{name:42}" + "  ".join(cells))
    for other, goals in ((PEER, (1.3, 1.5, 3.0)), (STATIC, (0.7, 0.7, 0.75))):
        found = ratios(figures, other)
        cells = [f"{found[c]:.2f} (goal {goal})" for c, goal in zip(CONCURRENCIES, goals, strict=True)]
        print(f"{'ratio to ' + other:54}" + "  ".join(cells))


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot throughput and time to first token over concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, rows in result["figures"].items():
        for axis, key in zip(axes, ("tokens_per_s", "ttft_ms"), strict=True):
            if any(key in row for row in rows[CONCURRENCIES[0]]):
                values = [statistics.median(row[key] for row in rows[c]) for c in CONCURRENCIES]
                axis.plot([str(c) for c in CONCURRENCIES], values, marker="o", label=name)
    for axis, label in zip(axes, ("tokens/s", "first token, ms (p50)"), strict=True):
        axis.set_xlabel("concurrent streams")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"4.2 M Llama, float32, {NEW_TOKENS} new tokens: {result['machine']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of our worker")
    options = parser.parse_args()
    result = run(options.rounds, options.threads)
    report(result)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "chat.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, RESULTS / "chat.png")


if __name__ == "__main__":
    main()
