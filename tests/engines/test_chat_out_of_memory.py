"""Memory that runs out at any operation of a step: nobody gets another's text, and the cache stays whole.

Each operation of torch in the engine's thread fails once, one after another, while requests of all kinds run:
prompts that begin alike, several choices, penalties, logprobs, preemption. On a GPU each may allocate memory,
those in place too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protocol.events import Delta, Event, Failed, Finished
from tests.engines.test_chat_memory import assert_whole
from tests.engines.tiny_chat import CONFIGS, Collector, chat_job, make_engine, run, save_model
from workers.engines.chat import ChatEngine, backend
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache import prefix_cache
from workers.engines.chat.model.layers import LayerOperations
from workers.engines.chat.pipeline import DecodePipeline, LaunchedStep
from workers.engines.chat.sampling.choose import choose

PAGES = 10
"""Of 8 tokens: too few for all requests at once."""

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.9, "n": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "max_tokens": 6},
    {"temperature": 0.0, "max_tokens": 2, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "max_tokens": 4},
    {"temperature": 1.0, "repetition_penalty": 1.2, "max_tokens": 5},
]
"""The second one's logprobs keep the first steps from being launched ahead, but not the others."""


FAILURES = ("out_of_memory", "engine_stopped")


class Faults(TorchDispatchMode):
    """Raises at some operations, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.failing = range(0)
        """Numbers of operations, from 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            if self.operations in self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    return save_model(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture(autouse=True)
def gpu_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of torch everywhere, as on a GPU, and no compiled loops."""
    monkeypatch.setattr(backend, "CPU_PAGE", 8)
    monkeypatch.setattr(prefix_cache, "BEGINNING", 4)
    monkeypatch.setattr(backend, "_paged_attention", PagedAttention)
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [LayerOperations])


class Trial:
    """An engine whose steps fail as told."""

    def __init__(self, weights: Path, *, pipelined: bool) -> None:
        self.engine: ChatEngine
        self.collector: Collector
        self.engine, self.collector = make_engine(weights, kv_cache_tokens=8 * PAGES, max_batch_size=6)
        parts = self.engine.parts
        parts.sampler._choose = choose
        self.launched = 0
        """How many steps were launched before the tokens of the step before were read."""
        if pipelined:
            parts.pipeline = DecodePipeline(parts.cache, parts.scheduler, parts.runner, parts.sampler)
            self._count_launches(parts.pipeline)
        self.faults = Faults()
        executor = self.engine._executor
        assert executor is not None
        work = executor.work

        def with_faults() -> bool:
            with self.faults:
                return work()

        executor.work = with_faults  # type: ignore[method-assign]
        self._runs = 0

    def _count_launches(self, pipeline: DecodePipeline) -> None:
        launch_after = pipeline.launch_after

        def counted(step: LaunchedStep) -> LaunchedStep | None:
            after = launch_after(step)
            self.launched += after is not None
            return after

        pipeline.launch_after = counted  # type: ignore[method-assign]

    def assert_whole(self) -> None:
        """Nothing of the requests is left, and the cache's bookkeeping is consistent."""
        scheduler, cache = self.engine.parts.scheduler, self.engine.parts.cache
        assert scheduler._prefixes is not None
        assert_whole(cache, scheduler._prefixes, [])
        assert not scheduler.waiting and not scheduler.running and not self.engine.parts.outputs.by_id

    def run(self, failing: range) -> list[Any]:
        """Run the jobs, while operations with these numbers fail. Returns the outcome of each."""
        self.faults.operations, self.faults.failing = 0, failing
        self._runs += 1
        beginning = "the quick brown fox jumps over the lazy dog "
        jobs = [
            chat_job(f"{self._runs}.{at}", beginning + str(at), ignore_eos=True, seed=at, **kind)
            for at, kind in enumerate(KINDS)
        ]
        return [outcome(result.events) for result in run(self.engine, self.collector, jobs)]


def outcome(events: list[Event]) -> Any:
    """Text and logprobs of each choice, or the code of the error."""
    if isinstance(events[-1], Failed):
        return events[-1].code
    assert isinstance(events[-1], Finished)
    choices: dict[int, list[Any]] = {}
    for event in events[:-1]:
        assert isinstance(event, Delta)
        logprobs = [(each.token, pytest.approx(each.logprob, abs=1e-4)) for each in event.logprobs or ()]
        text, all_logprobs = choices.setdefault(event.index, ["", []])
        choices[event.index] = [text + event.text, all_logprobs + logprobs]
    return choices


@pytest.mark.slow
@pytest.mark.parametrize("pipelined", [False, True], ids=["single steps", "launched ahead"])
@pytest.mark.parametrize("count", [1, 2], ids=["once", "and again"])
@pytest.mark.timeout(600)  # hundreds of runs: half a minute on two idle cores
def test_memory_that_runs_out_at_any_operation(weights: Path, pipelined: bool, count: int) -> None:
    """A second failure in a row hits the first sequence that is then computed alone: its request fails."""
    trial = Trial(weights, pipelined=pipelined)
    failed = stopped = 0
    try:
        expected = trial.run(range(0))
        assert trial.run(range(0)) == expected
        metrics = trial.engine.metrics
        assert metrics.preemptions and metrics.cached_tokens
        assert not pipelined or trial.launched
        at = 1
        while at <= trial.faults.operations:
            found = trial.run(range(at, at + count))
            wrong = [each for each, own in zip(found, expected, strict=True) if each not in (own, *FAILURES)]
            assert not wrong, f"operation {at}"
            failed += found.count("out_of_memory")
            if "engine_stopped" in found:
                stopped += 1
                trial.engine._thread.join(60)
                assert not trial.engine.status().alive
                trial.engine.close()
                trial = Trial(weights, pipelined=pipelined)
                trial.run(range(0))
            else:
                trial.assert_whole()
            at += count
    finally:
        trial.engine.close()
    assert at > 500
    assert (failed > 0) == (count > 1)
    # only where the scheduler copies the beginning of a page
    assert 0 < stopped <= 8
