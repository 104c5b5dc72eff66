"""The servers that benchmarks.chat compares, each with its own defaults unless said otherwise."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.stream_client import chat_request, percentile, run_streams
from tests.deployment import Deployment, free_port, wait_until

NEW_TOKENS = 128
KV_TOKENS = 16384
"""Size of the KV cache of ours: 64 requests need less."""


class Workload(NamedTuple):
    """A model and the requests for it."""

    weights: Path
    prompts: Callable[[int], list[str]]
    """Makes so many different prompts."""
    parameters: dict[str, object]
    """Added to each request."""
    dtype: str = "float32"
    """Of the weights, as torch, vLLM and the catalogue name it."""


Measure = Callable[[int], dict[str, float]]
"""Takes the concurrency; returns tokens_per_s and, for servers, ttft_ms (p50) and gap_ms (p99 between
tokens)."""


def measure_server(port: int, model: str, workload: Workload, concurrency: int) -> dict[str, float]:
    """Measure one burst of streamed chats."""
    requests = [
        chat_request(
            f"127.0.0.1:{port}",
            {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                **workload.parameters,
            },
        )
        for prompt in workload.prompts(concurrency)
    ]
    results = run_streams(port, requests)
    # a server that falls behind sends several tokens in one event, so tokens are not counted
    assert all(result.ended_at and result.tokens for result in results), "a stream broke off"
    seconds = max(result.ended_at for result in results) - min(result.sent_at for result in results)
    first = [(result.first_token_at - result.sent_at) * 1000 for result in results]
    gaps = [gap * 1000 for result in results for gap in result.gaps_s]
    return {
        "tokens_per_s": concurrency * NEW_TOKENS / seconds,
        "ttft_ms": percentile(first, 0.5),
        "gap_ms": percentile(gaps, 0.99),
    }


@contextmanager
def ours(folder: Path, workload: Workload, threads: int | None) -> Iterator[Measure]:
    """Run this service: gunicorn, one worker, Redis. `threads`: torch_threads, None for the default."""
    own = "" if threads is None else f"torch_threads = {threads}"
    catalogue = f"""
project = "Benchmark"
[[models]]
name = "bench"
tasks = ["chat"]
weights = "{workload.weights}"
[models.engine]
dtype = "{workload.dtype}"
max_batch_size = 64
{own}
kv_cache_tokens = {KV_TOKENS}
prefix_cache = false
"""
    with Deployment(folder, catalogue=catalogue) as service:
        service.start("bench")
        yield lambda concurrency: measure_server(service.port, "bench", workload, concurrency)


@contextmanager
def transformers_serve(folder: Path, workload: Workload) -> Iterator[Measure]:
    """Run transformers' own server."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(workload.weights)]
    command += ["--continuous-batching", "--device", "cpu"]
    with _server(folder / "transformers.log", command, {"HF_HUB_OFFLINE": "1"}) as port:
        yield lambda concurrency: measure_server(port, str(workload.weights), workload, concurrency)


@contextmanager
def vllm_serve(folder: Path, workload: Workload, program: str) -> Iterator[Measure]:
    """Run vLLM's server, `program`, from an environment of its own."""
    command = [program, "serve", str(workload.weights), "--dtype", workload.dtype, "--max-model-len", "4096"]
    command += ["--no-enable-prefix-caching", "--max-num-seqs", "64"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    with _server(folder / "vllm.log", command, environment, timeout_s=600) as port:
        yield lambda concurrency: measure_server(port, str(workload.weights), workload, concurrency)


@contextmanager
def _server(log_file: Path, command: list[str], own: dict[str, str], timeout_s: float = 120) -> Iterator[int]:
    """Run a server, wait until it is healthy, yield its port."""
    port = free_port()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, **own},
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, log_file.read_text()[-3000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        wait_until(answers, timeout_s=timeout_s, what=f"{command[0]} answers")
        yield port
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def static_batch(workload: Workload) -> Iterator[Measure]:
    """Run `generate` on one padded batch, with all of torch's threads."""
    model = AutoModelForCausalLM.from_pretrained(workload.weights, dtype=getattr(torch, workload.dtype))
    tokenizer = AutoTokenizer.from_pretrained(workload.weights)
    tokenizer.padding_side = "left"

    def measure(concurrency: int) -> dict[str, float]:
        batch = tokenizer(workload.prompts(concurrency), return_tensors="pt", padding=True)
        began = time.monotonic()
        with torch.inference_mode():
            model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        return {"tokens_per_s": concurrency * NEW_TOKENS / (time.monotonic() - began)}

    yield measure
