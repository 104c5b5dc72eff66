"""An engine without the service around it, and requests for it, as the benchmarks of the engine use them."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalogue import ChatModelEntry
from protocol.events import Delta, Event, is_terminal
from protocol.jobs import ChatJob, OutputFormat, SamplingParams
from workers.engines.chat import ChatEngine

NEW_TOKENS = 128
WORDS = [
    "red",
    "circle",
    "what",
    "can",
    "you",
    "draw",
    "please",
    "tell",
    "me",
    "a",
    "story",
    "about",
    "ports",
    "now",
]


class Timeline:
    """An `emit` that records the tokens of each request, with the time and the engine thread's CPU time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.gains: dict[str, list[tuple[float, int, float]]] = {}
        self.ended: set[str] = set()
        self.prompt_tokens: dict[str, int] = {}

    def __call__(self, events: Sequence[tuple[str, Event]]) -> None:
        now, busy = time.perf_counter(), time.thread_time()
        with self._changed:
            for request_id, event in events:
                if isinstance(event, Delta):
                    self.gains.setdefault(request_id, []).append((now, event.tokens, busy))
                if is_terminal(event):
                    usage = getattr(event, "usage", None)
                    assert usage is not None, event
                    self.prompt_tokens[request_id] = usage.prompt_tokens
                    self.ended.add(request_id)
            self._changed.notify_all()

    def wait(self, condition: Any) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, 600):
                raise TimeoutError("the engine made no progress for 600 s")

    def tokens(self, request_id: str) -> int:
        return sum(count for _, count, _ in self.gains.get(request_id, ()))


class EngineBench:
    """An engine, and requests for it."""

    def __init__(self, weights: Path, threads: int, **options: Any) -> None:
        """`options`: more of the catalogue's engine options."""
        options = {"torch_threads": threads, "max_batch_size": 64, **options}
        entry = {"name": "bench", "tasks": ["chat"], "weights": str(weights), "engine": options}
        self.engine = ChatEngine(ChatModelEntry.model_validate(entry))
        self.timeline = Timeline()
        self.engine.load(self.timeline)
        self._serial = 0

    def submit(
        self, words: int, tokens: int = NEW_TOKENS, output_format: OutputFormat | None = None, **sampling: Any
    ) -> str:
        """Submit a request with a prompt of its own. Returns its id."""
        self._serial += 1
        text = [str(self._serial)] + [WORDS[(self._serial * 7 + at * at) % len(WORDS)] for at in range(words)]
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **sampling})
        messages = [{"role": "user", "content": " ".join(text)}]
        name = f"r{self._serial}"
        self.engine.submit(
            ChatJob(id=name, model="bench", messages=messages, sampling=params, output_format=output_format)
        )
        return name

    def wait(self, ids: list[str]) -> None:
        self.timeline.wait(lambda: all(request_id in self.timeline.ended for request_id in ids))

    def burst(self, count: int, **sampling: Any) -> tuple[float, float, int]:
        """Run `count` requests at once. Returns wall seconds, CPU seconds, and the tokens of a prompt."""
        wall, cpu = time.perf_counter(), time.process_time()
        ids = [self.submit(14, **sampling) for _ in range(count)]
        self.wait(ids)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall, cpu, self.timeline.prompt_tokens[ids[0]]
