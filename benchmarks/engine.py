"""Measures the chat engine by itself, without web, Redis or Celery.

Usage: `python -m benchmarks.engine [--json FILE]`. Same model, same prompts, same process. Each round runs
transformers' static-batch `generate` and the engine one after the other, and ratios are taken inside a round,
because the speed of a shared machine varies. Prints

- tokens/s at 1, 16 and 64 requests and the ratio to the static batch, by the clock and by CPU time, which
  other processes don't disturb (with one torch thread, engine and static batch are one thread's work each),
- the share of a step that passes outside the model, greedy and sampled,
- the speed of 31 short requests beside one of 3,000 tokens, relative to 31 of them beside a short one,
- the p99 gap between tokens of 16 running streams while a prompt of 2,000 tokens is computed,
- what structured output costs a step with a vocabulary of 128,256 tokens (structured.py).
"""

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import structured
from benchmarks.engine_requests import NEW_TOKENS, EngineBench

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "models" / "chat"


class Bench(EngineBench):
    """The engine and the plain model, with the same weights."""

    def __init__(self, weights: Path, threads: int) -> None:
        super().__init__(weights, threads)
        self.model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()

    def static(self, count: int, prompt: int) -> tuple[float, float]:
        """Run one static batch of `generate`. Returns wall and CPU seconds."""
        ids = torch.randint(8, 700, (count, prompt))
        wall, cpu = time.perf_counter(), time.process_time()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        return time.perf_counter() - wall, time.process_time() - cpu


def throughput(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for count in (1, 16, 64):
        engine, static = [], []
        for _ in range(rounds):
            wall, cpu, prompt = bench.burst(count)
            engine.append((wall, cpu))
            static.append(bench.static(count, prompt))
        pairs = list(zip(engine, static, strict=True))
        rows.append(
            {
                "requests": count,
                "prompt_tokens": prompt,
                "engine_tokens_per_s": count * NEW_TOKENS / min(wall for wall, _ in engine),
                "static_tokens_per_s": count * NEW_TOKENS / min(wall for wall, _ in static),
                "ratio": statistics.median(theirs[0] / ours[0] for ours, theirs in pairs),
                "ratio_cpu_time": statistics.median(theirs[1] / ours[1] for ours, theirs in pairs),
            }
        )
    return rows


def outside_share(bench: Bench, rounds: int, **sampling: Any) -> float:
    """The share of the steps' time that is outside the model, at 64 requests: the median of the rounds."""
    shares = []
    for _ in range(rounds):
        before = dataclasses.replace(bench.engine.metrics)
        bench.burst(64, **sampling)
        after = bench.engine.metrics
        steps = after.step_seconds - before.step_seconds
        shares.append(1 - (after.model_seconds - before.model_seconds) / steps)
    return statistics.median(shares)


def long_among_short(bench: Bench, rounds: int) -> dict[str, float]:
    """Tokens/s of 31 short requests beside another short one, and beside one of 3,000 tokens."""

    def speed(words: int) -> float:
        other = bench.submit(words, 600)
        bench.timeline.wait(lambda: bench.timeline.tokens(other))
        started = time.process_time()
        ids = [bench.submit(14) for _ in range(31)]
        bench.wait(ids)
        seconds = time.process_time() - started
        bench.engine.cancel(other, "deadline")
        bench.wait([other])
        return 31 * NEW_TOKENS / seconds

    pairs = [(speed(14), speed(2320)) for _ in range(rounds)]
    return {
        "beside_a_short_one": max(alone for alone, _ in pairs),
        "beside_a_long_one": max(beside for _, beside in pairs),
        "ratio": statistics.median(beside / alone for alone, beside in pairs),
    }


def prefill_gaps(bench: Bench) -> dict[str, float]:
    """Milliseconds between tokens of 16 streams: usually, and while a prompt of 2,000 tokens is computed."""
    ids = [bench.submit(14, 400) for _ in range(16)]
    bench.timeline.wait(lambda: all(bench.timeline.tokens(request_id) > 60 for request_id in ids))
    began = time.perf_counter()
    long = bench.submit(1560, 2)
    bench.wait([long])
    ended = bench.timeline.gains[long][0][0]
    bench.wait(ids)
    result = {
        "prompt_tokens": bench.timeline.prompt_tokens[long],
        "time_to_first_token_ms": (ended - began) * 1000,
    }
    # by CPU time too: other programs on the machine lengthen single gaps by the clock at random
    for name, part in (("", 0), ("_cpu_time", 2)):
        during: list[float] = []
        ordinary: list[float] = []
        for request_id in ids:
            for earlier, later in itertools.pairwise(bench.timeline.gains[request_id][40:]):
                if later[1] > 1:
                    continue  # half a character was held back: this gap is two steps
                gaps = during if began < later[0] and earlier[0] < ended else ordinary
                gaps.append((later[part] - earlier[part]) * 1000)
        result |= {
            f"median_ms{name}": statistics.median(ordinary),
            f"p99_ordinary_ms{name}": statistics.quantiles(ordinary, n=100)[98],
            f"p99_during_ms{name}": statistics.quantiles(during, n=100)[98],
            f"p99_ratio{name}": statistics.quantiles(during, n=100)[98] / statistics.median(ordinary),
        }
    return result


def make_model(folder: Path) -> None:
    """Save a random Llama of 4.2 million parameters with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    # every token that the model may choose has a text, so that every step of a stream shows
    tokenizer.add_tokens([f" w{number}" for number in range(len(tokenizer), config.vocab_size)])
    tokenizer.save_pretrained(folder)


def measure(rounds: int, threads: int) -> dict[str, Any]:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        bench = Bench(Path(folder), threads)
        try:
            bench.burst(8)
            bench.static(8, 40)
            return {
                "machine": f"{platform.machine()}, {torch.get_num_threads()} torch thread(s), torch {torch.__version__}",
                "throughput": throughput(bench, rounds),
                "outside_model_greedy": outside_share(bench, rounds),
                "outside_model_sampled": outside_share(bench, rounds, temperature=0.7, top_p=0.9, seed=1),
                "long_among_short": long_among_short(bench, rounds),
                "prefill_gaps": prefill_gaps(bench),
                "preemptions": bench.engine.metrics.preemptions,
            }
        finally:
            bench.engine.close()


def show(result: dict[str, Any]) -> None:
    print(result["machine"])
    print("requests  engine tok/s  static tok/s  ratio  ratio by CPU time")
    for row in result["throughput"]:
        print(
            f"{row['requests']:8d}  {row['engine_tokens_per_s']:12.0f}  {row['static_tokens_per_s']:12.0f}"
            f"  {row['ratio']:5.2f}  {row['ratio_cpu_time']:5.2f}"
        )
    print(f"outside the model at 64 requests, greedy: {result['outside_model_greedy']:.1%} of a step")
    print(f"outside the model at 64 requests, temperature and top_p: {result['outside_model_sampled']:.1%}")
    long = result["long_among_short"]
    print(
        f"31 short requests: {long['beside_a_short_one']:.0f} tok/s beside a short one,"
        f" {long['beside_a_long_one']:.0f} beside one of 3,000 tokens: {long['ratio']:.2f}"
    )
    gaps = result["prefill_gaps"]
    for name, words in (("", "by the clock"), ("_cpu_time", "by CPU time")):
        print(
            f"gaps of 16 streams {words}: median {gaps['median_ms' + name]:.1f} ms, p99"
            f" {gaps['p99_ordinary_ms' + name]:.1f} ms; while {gaps['prompt_tokens']} tokens are computed: p99"
            f" {gaps['p99_during_ms' + name]:.1f} ms = {gaps['p99_ratio' + name]:.1f} x the ordinary median"
        )
    print(f"first token of that prompt after {gaps['time_to_first_token_ms']:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the chat engine with transformers' static batch.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; the service leaves one core to the web process"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.threads)
    show(result)
    result["structured"] = structured.measure(max(1, arguments.rounds // 2), arguments.threads)
    structured.show(result["structured"])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
