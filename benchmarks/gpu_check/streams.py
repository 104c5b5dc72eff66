"""Runs many requests of an engine at once, and records their events."""

import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.gpu_check.report import Skipped
from benchmarks.gpu_check.texts import Texts
from protocol.events import Delta, Event, Failed, is_terminal
from protocol.jobs import ChatJob, SamplingParams
from workers.engines.base import Engine
from workers.engines.chat import ChatEngine
from workers.engines.chat.build import PREFILL_CHUNK
from workers.engines.chat.sequence import Request

HANG_S = 600


class Recorder:
    """An `emit` that records each request's tokens with their times, and all its other events."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engine: ChatEngine | None = None
        self._serials = itertools.count()
        self.steps: list[tuple[float, Counter[str]]] = []
        """Time of each emit, and the tokens of each request in it."""
        self.tokens: Counter[str] = Counter()
        self.first: dict[str, float] = {}
        """By request, the time of its first token."""
        self.others: dict[str, list[Event]] = {}
        """By request, its events that are no text."""
        self.ended: dict[str, Event] = {}
        self.requests: dict[str, Request] = {}
        """The engine's own record of each chat, which has the ids of its tokens."""

    def new_id(self) -> str:
        """Return an id that no request of this recorder has had: an old one's result would be taken for
        its."""
        return f"r{next(self._serials)}"

    def follow(self, engine: ChatEngine) -> None:
        """Keep the engine's record of each request from now on."""
        self._engine = engine

    def __call__(self, events: Sequence[tuple[str, Event]]) -> None:
        now, step = time.perf_counter(), Counter[str]()
        with self._changed:
            if self._engine is not None:
                self.requests.update(self._engine.parts.outputs.by_id)
            for request_id, event in events:
                if isinstance(event, Delta):
                    self.first.setdefault(request_id, now)
                    step[request_id] += event.tokens
                else:
                    self.others.setdefault(request_id, []).append(event)
                if is_terminal(event):
                    self.ended[request_id] = event
            self.steps.append((now, step))
            self.tokens.update(step)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. It is asked after each emit."""
        with self._changed:
            if not self._changed.wait_for(condition, HANG_S):
                raise TimeoutError(f"the engine made no progress for {HANG_S} s")

    def wait_ended(self, engine: Engine, ids: Sequence[str]) -> None:
        """Wait for the ends of these requests. Raises RuntimeError if the engine's thread dies."""

        def over() -> bool:
            return all(request_id in self.ended for request_id in ids) or not engine.status().alive

        self.wait(over)
        if missing := [request_id for request_id in ids if request_id not in self.ended]:
            raise RuntimeError(f"the engine died with {len(missing)} requests")

    def failures(self) -> list[Failed]:
        """The requests that failed, those that were cancelled left out."""
        failed = [event for event in self.ended.values() if isinstance(event, Failed)]
        return [event for event in failed if event.code != "cancelled"]


class Speed(NamedTuple):
    """Of several streams that all run. `first_token_ms` counts from each request's own start."""

    tokens_per_s: float
    mean_context: float
    first_token_ms: float
    """The median."""
    last_first_token_ms: float
    """The largest."""


class Streams:
    """Some requests that run at once. Inside the `with` block all have a first token, and none has ended."""

    def __init__(
        self,
        engine: ChatEngine,
        recorder: Recorder,
        texts: Texts,
        count: int,
        prompt_tokens: int,
        window: int,
        **sampling: Any,
    ) -> None:
        """`window`: tokens that each stream should produce beside all others. Raises Skipped: no room."""
        self._engine, self._recorder, self._window = engine, recorder, window
        _require_room(engine, count, prompt_tokens + window)
        room = engine.parts.max_context - 2 * prompt_tokens
        params = {"temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, **sampling}
        self._jobs = [
            ChatJob(
                id=recorder.new_id(),
                model=engine.entry.name,
                messages=[{"role": "user", "content": texts.content(prompt_tokens)}],
                sampling=SamplingParams(max_tokens=room, **params),
            )
            for _ in range(count)
        ]
        self._ids = [job.id for job in self._jobs]
        self._started: dict[str, float] = {}

    def __enter__(self) -> "Streams":
        for job in self._jobs:
            self._started[job.id] = time.perf_counter()
            self._engine.submit(job)
        self._wait(lambda: all(key in self._recorder.first for key in self._ids))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in self._ids:
            self._engine.cancel(key, "cancelled")
        if error is None:
            self._recorder.wait_ended(self._engine, self._ids)

    def wait_more(self, tokens: int) -> None:
        """Wait until each stream has so many tokens more."""
        goals = {key: self._recorder.tokens[key] + tokens for key in self._ids}
        self._wait(lambda: all(self._recorder.tokens[key] >= goal for key, goal in goals.items()))

    def speed(self) -> Speed:
        """Measure while all streams produce the window's tokens."""
        self.wait_more(self._window)
        steps, firsts = list(self._recorder.steps), [self._recorder.first[key] for key in self._ids]
        began = max(firsts)
        later = [(at, step.total()) for at, step in steps if at > began]
        requests = [self._recorder.requests[key] for key in self._ids]
        lengths = [len(request.prompt) + len(request.sequences[0].output) for request in requests]
        delays = [self._recorder.first[key] - self._started[key] for key in self._ids]
        return Speed(
            tokens_per_s=sum(count for _, count in later) / (later[-1][0] - began),
            mean_context=statistics.mean(lengths) - self._window / 2,
            first_token_ms=statistics.median(delays) * 1000,
            last_first_token_ms=max(delays) * 1000,
        )

    def _wait(self, condition: Callable[[], bool]) -> None:
        ended = self._recorder.ended
        self._recorder.wait(lambda: condition() or any(key in ended for key in self._ids))
        if early := [ended[key] for key in self._ids if key in ended]:
            raise RuntimeError(f"{len(early)} of {len(self._ids)} streams ended early: {early[0]}")


def _require_room(engine: ChatEngine, count: int, tokens: int) -> None:
    options, parts = engine.entry.engine, engine.parts
    if count > options.max_batch_size:
        raise Skipped(f"max_batch_size is {options.max_batch_size}")
    # while the last prompts are computed, the first streams have produced a token in each step
    steps = count * tokens / (options.prefill_chunk or PREFILL_CHUNK[parts.cache.pool.device.type])
    needed, cache = int(count * (tokens + steps / 2)), parts.kv_cache_tokens
    if needed > cache:
        raise Skipped(f"{needed:,} tokens don't fit into the KV cache of {cache:,}")
