"""Measures a chat engine with weights in float32 and in bfloat16 on a CPU: python -m benchmarks.precision

SmolLM2-135M at 1, 16 and 64 requests with prompts of some 50 tokens and 128 new tokens, in both dtypes, in
turns in one process and one torch thread. Ratios are taken inside a round, because the speed of a shared
machine varies. Prints the median of the tokens/s by CPU time, which other processes don't disturb, and of the
ratios by CPU time and by the clock; before that what `dtype = "auto"` chooses here.
"""

import argparse
import statistics
import subprocess

import torch
from transformers import AutoConfig

from benchmarks.chat import SMOLLM2
from benchmarks.engine_requests import NEW_TOKENS, EngineBench
from tests.deployment import ROOT
from workers.engines.chat.model.precision import choose_precision

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    subprocess.run([ROOT / "scripts" / "fetch-smollm2"], check=True)
    torch.set_num_threads(1)
    chosen = choose_precision("auto", AutoConfig.from_pretrained(SMOLLM2), torch.device("cpu"))
    print(f"auto: {chosen.describe()}")
    benches = [EngineBench(SMOLLM2, 1, dtype=dtype, kv_cache_tokens=16384) for dtype in DTYPES]
    try:
        for bench in benches:
            bench.burst(8)
        for count in (1, 16, 64):
            rounds = [[bench.burst(count) for bench in benches] for _ in range(options.rounds)]
            speeds = [
                count * NEW_TOKENS / statistics.median(cpu for _, cpu, _ in of)
                for of in zip(*rounds, strict=True)
            ]
            by_clock, by_cpu = (
                statistics.median(before[at] / after[at] for before, after in rounds) for at in (0, 1)
            )
            print(
                f"{count:2d} requests: {speeds[0]:5.0f} tokens/s in float32, {speeds[1]:5.0f} in bfloat16;"
                f" ratio {by_cpu:.2f} by CPU time, {by_clock:.2f} by the clock"
            )
    finally:
        for bench in benches:
            bench.engine.close()


if __name__ == "__main__":
    main()
