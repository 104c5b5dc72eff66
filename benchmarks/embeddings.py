"""Compares the embedding engine with two plain ways: python -m benchmarks.embeddings

all-MiniLM-L6-v2 in one torch thread, for requests of one text and for requests of many. The others:
transformers text by text, and one static batch of all texts padded to the longest. Texts have 4 to 250
tokens, mostly few, as queries and passages have. All take turns in one process; ratios are taken inside a
round, because the speed of a shared machine varies. Prints the medians of tokens/s and of the ratios.
"""

import argparse
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModel, AutoTokenizer

from catalogue import EmbeddingModelEntry
from protocol.events import Event, Failed, is_terminal
from protocol.jobs import EmbeddingJob
from tests.deployment import ROOT
from workers.engines.embedding import EmbeddingEngine

WEIGHTS = ROOT / "weights/all-minilm-l6-v2"
WORDS = [
    "the",
    "of",
    "model",
    "and",
    "river",
    "in",
    "stone",
    "a",
    "to",
    "light",
    "city",
    "that",
    "is",
    "walks",
    "for",
    "seven",
    "green",
    "on",
    "with",
    "paper",
]


class EngineBench:
    """The engine, which gets texts in requests of a given size."""

    def __init__(self) -> None:
        entry = EmbeddingModelEntry.model_validate(
            {
                "name": "bench",
                "tasks": ["embedding"],
                "weights": str(WEIGHTS),
                "engine": {"torch_threads": 1},
            }
        )
        self.engine = EmbeddingEngine(entry)
        self._ended = threading.Semaphore(0)
        self.engine.load(self._count)

    def run(self, texts: Sequence[str], in_request: int) -> None:
        """Return when all texts have their vectors."""
        parts = [texts[at : at + in_request] for at in range(0, len(texts), in_request)]
        for number, part in enumerate(parts):
            self.engine.submit(EmbeddingJob(id=str(number), model="bench", inputs=list(part)))
        for _ in parts:
            self._ended.acquire()

    def _count(self, events: Sequence[tuple[str, Event]]) -> None:
        for _, event in events:
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if is_terminal(event):
                self._ended.release()


class Plain:
    """transformers and mean pooling, without an engine."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
        self._model = AutoModel.from_pretrained(WEIGHTS).eval()

    @torch.inference_mode()
    def run(self, texts: Sequence[str]) -> None:
        """Compute all texts as one padded batch."""
        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=256
        )
        hidden, mask = self._model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()

    def run_one_by_one(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.run([text])


def make_texts(count: int) -> list[str]:
    """The same texts each time: three of four are short."""
    draw = random.Random(7)
    lengths = [draw.randint(2, 30) if draw.random() < 0.75 else draw.randint(60, 245) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    subprocess.run([ROOT / "scripts" / "fetch-minilm"], check=True)
    torch.set_num_threads(1)
    texts = make_texts(options.texts)
    bench, plain = EngineBench(), Plain()
    tokens = sum(map(len, plain.tokenizer(texts)["input_ids"]))
    ways: dict[str, Callable[[], None]] = {
        "engine, one text in a request": lambda: bench.run(texts, 1),
        f"engine, {len(texts)} texts in a request": lambda: bench.run(texts, len(texts)),
        "transformers, text by text": lambda: plain.run_one_by_one(texts),
        "transformers, one padded batch": lambda: plain.run(texts),
    }
    try:
        rounds = [[measure(way) for way in ways.values()] for _ in range(options.rounds + 1)][1:]
    finally:
        bench.engine.close()
    print(f"{len(texts)} texts of {tokens} tokens, medians of {options.rounds} rounds")
    for at, name in enumerate(ways):
        seconds = statistics.median(times[at] for times in rounds)
        ratios = [statistics.median(times[other] / times[at] for times in rounds) for other in (2, 3)]
        print(
            f"{name:34} {tokens / seconds:6.0f} tokens/s; {ratios[0]:.2f} x text by text,"
            f" {ratios[1]:.2f} x one padded batch"
        )


def measure(way: Callable[[], None]) -> float:
    """Return the seconds that a way takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
