"""Measures what structured output costs a step, with Llama 3's vocabulary of 128,256 tokens.

Usage: `python -m benchmarks.structured`; `benchmarks.engine` runs it, too. The tokenizer is that of the
package llama-models. The weights are random, so each allowed token is about as probable as any other; the
model is small, so a step leaves less time for masks than that of a useful one. In each round each schema's
requests and free ones run one after the other, and the difference of their steps is taken there. The line
"free once more" is such a difference of two free runs: what the machine's noise is.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging as transformers_logging

from benchmarks.engine_requests import EngineBench
from protocol.jobs import OutputFormat
from workers.engines.chat.engine import ChatEngine

ROWS = 64
STEPS = 24
"""Measured for each schema and round."""
VOCABULARY = 128_256
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def closed(**properties: Any) -> dict[str, Any]:
    """A schema of objects with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 20}
SCHEMAS: dict[str, dict[str, Any]] = {
    "free strings": closed(name={"type": "string"}, city={"type": "string"}),
    "strings of at most 20": closed(name=SHORT, city=SHORT),
    "strings of at most 200": closed(name={"type": "string", "maxLength": 200}),
    "strings with a pattern": closed(name={"type": "string", "pattern": "^[A-Z][a-z]{2,12}$"}),
    "numbers": {"type": "number"},
    "integers in bounds": {"type": "integer", "minimum": 0, "maximum": 150},
    "enum": {"enum": ["red", "green", "blue", "light grey"]},
    "dates and ids": closed(
        at={"type": "string", "format": "date-time"}, id={"type": "string", "format": "uuid"}
    ),
    "nested objects": closed(
        user=closed(name=SHORT, home=closed(zip={"type": "string", "pattern": "^[0-9]{5}$"})),
        tags={"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    ),
    "60 properties": closed(
        **{f"property_{at}": {"type": ["string", "integer", "boolean"][at % 3]} for at in range(60)}
    ),
    "60 optional properties": {
        **closed(
            **{f"property_{at}": {"type": ["string", "integer", "boolean"][at % 3]} for at in range(60)}
        ),
        "required": [],
    },
    "any objects (json_object)": {"type": "object"},
}
"""Each is that of the items of an array which is longer than any answer here."""


class Cost(NamedTuple):
    """Milliseconds of a step."""

    step: float
    """By the clock."""
    outside: float
    """By the clock, outside of the forward pass: waiting for masks, their use, sampling, texts, events."""
    outside_cpu: float
    """The same in CPU time of the engine's thread."""
    process_cpu: float
    """The whole step in CPU time of the process, with the thread that fills masks."""


class StepClock:
    """Measures an engine's steps in which ROWS rows decode and no prompt is computed."""

    def __init__(self, engine: ChatEngine) -> None:
        self._metrics = engine.metrics
        self._step = engine.step
        self._forward = engine.parts.runner.forward
        self._costs: list[Cost] = []
        self._enough = threading.Event()
        self._in_forward = (0.0, 0.0)
        engine.step = self.step  # type: ignore[method-assign]
        engine.parts.runner.forward = self.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        clock, cpu = time.perf_counter(), time.thread_time()
        logits = self._forward(*args, **kwargs)
        self._in_forward = (time.perf_counter() - clock, time.thread_time() - cpu)
        return logits

    def step(self) -> bool:
        rows, chunks = self._metrics.decoded_rows, self._metrics.prefill_chunks
        clock, cpu, process = time.perf_counter(), time.thread_time(), time.process_time()
        worked = self._step()
        clock, cpu, process = (
            time.perf_counter() - clock,
            time.thread_time() - cpu,
            time.process_time() - process,
        )
        if self._metrics.decoded_rows - rows == ROWS and self._metrics.prefill_chunks == chunks:
            seconds = (clock, clock - self._in_forward[0], cpu - self._in_forward[1], process)
            self._costs.append(Cost(*(1000 * each for each in seconds)))
            if len(self._costs) >= STEPS:
                self._enough.set()
        return worked

    def clear(self) -> None:
        """Forget the steps so far."""
        self._costs = []
        self._enough.clear()

    def take(self) -> Cost:
        """Wait for STEPS steps. Returns their mean; by the clock the median: others lengthen single steps."""
        assert self._enough.wait(300)
        step, outside, *cpu = zip(*self._costs[:STEPS], strict=True)
        return Cost(statistics.median(step), statistics.median(outside), *map(statistics.mean, cpu))


def make_model(folder: Path) -> None:
    """Save a random Llama with Llama 3's vocabulary, of 17 million parameters."""
    package = importlib.util.find_spec("llama_models")
    assert package is not None and package.origin is not None, "scripts/setup --bench installs llama-models"
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{at}|>" for at in range(254))]
    converter = TikTokenConverter(str(Path(package.origin).parent / "llama3" / "tokenizer.model"))
    converter.extra_special_tokens = special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), eos_token=special[1], chat_template=TEMPLATE
    )
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)


def output_format(items: dict[str, Any]) -> OutputFormat:
    schema = {"type": "array", "items": items, "minItems": 1000}
    return OutputFormat(kind="json_schema", text=json.dumps(schema), param="response_format")


def costs(bench: EngineBench, clock: StepClock, rounds: int, **sampling: Any) -> dict[str, Any]:
    """Milliseconds of a step with free rows, and by schema how many more with rows that follow it."""

    def step(wanted: OutputFormat | None) -> Cost:
        clock.clear()
        # no answer ends before the steps are measured, however long it takes to submit the others
        ids = [bench.submit(14, tokens=3000, output_format=wanted, **sampling) for _ in range(ROWS)]
        cost = clock.take()
        for one in ids:
            bench.engine.cancel(one, "deadline")
        bench.wait(ids)
        return cost

    free: list[Cost] = []
    formats: dict[str, OutputFormat | None] = {"free once more": None}
    formats |= {name: output_format(items) for name, items in SCHEMAS.items()}
    more: dict[str, list[Cost]] = {name: [] for name in formats}
    for _ in range(rounds):
        for name, wanted in formats.items():
            free.append(step(None))
            bound = step(wanted)
            more[name].append(Cost(*(own - other for own, other in zip(bound, free[-1], strict=True))))
    result: dict[str, Any] = {"free": _medians(free)}
    return result | {"more": {name: _medians(own) for name, own in more.items()}}


def _medians(rounds: list[Cost]) -> dict[str, float]:
    return {
        name: round(statistics.median(own), 3)
        for name, own in zip(Cost._fields, zip(*rounds, strict=True), strict=True)
    }


def measure(rounds: int, threads: int) -> dict[str, Any]:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        bench = EngineBench(Path(folder), threads)
        try:
            clock = StepClock(bench.engine)
            bench.burst(ROWS, tokens=4, output_format=output_format({"type": "object"}))
            return {
                "rows": ROWS,
                "vocabulary": VOCABULARY,
                "sampled": costs(bench, clock, rounds, temperature=0.7, seed=1),
                "greedy": costs(bench, clock, rounds),
            }
        finally:
            bench.engine.close()


def show(result: dict[str, Any]) -> None:
    print(f"{result['rows']} rows of {result['vocabulary']:,} tokens, ms of a step:")
    print(" " * 28 + "  ".join(f"{name:>11s}" for name in Cost._fields))
    for how in ("sampled", "greedy"):
        _show_line(f"{how}, free", result[how]["free"], "11.1f")
        for name, more in result[how]["more"].items():
            _show_line(f"  {name}", more, "+11.2f")


def _show_line(name: str, cost: dict[str, float], form: str) -> None:
    print(f"{name:28s}" + "  ".join(format(cost[field], form) for field in Cost._fields))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what structured output costs a step.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    show(measure(options.rounds, options.threads))


if __name__ == "__main__":
    main()
