"""The embedding engine on tiny models: its vectors are those of transformers, whatever shares a pass."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import Cancelled, DeadlineExceeded, EngineError, EngineStopped, OutOfMemory, ShuttingDown
from protocol.events import Usage
from tests.engines.tiny_chat import Collector
from tests.engines.tiny_embedding import (
    CONFIGS,
    SIZE,
    TEXTS,
    WORDS,
    add_modules,
    job,
    load,
    plain,
    save_model,
    vectors_of,
)
from workers.engines.embedding import EmbeddingEngine
from workers.watchdog import EngineHung, Watchdog

POOLING = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}

STEPS_OF_A_PASS = 3
"""Its two layers, and its vectors."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def engine(weights: Path) -> Iterator[EmbeddingEngine]:
    found, _ = load(weights)
    yield found
    found.close()


@pytest.fixture
def collector(engine: EmbeddingEngine, monkeypatch: pytest.MonkeyPatch) -> Collector:
    collector = Collector()
    monkeypatch.setattr(engine, "_emit", collector)
    return collector


@pytest.mark.parametrize("family", CONFIGS)
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    pooling = "last" if family == "qwen3" else "cls" if family in ("mpnet", "modernbert") else "mean"
    add_modules(folder, "Pooling", "Normalize", **{POOLING[pooling]: True})
    engine, collector = load(folder)
    engine.submit(job("r", *TEXTS))
    for text, vector in zip(TEXTS, vectors_of(collector, "r"), strict=True):
        torch.testing.assert_close(vector, plain(folder, text, pooling, normalize=True), atol=1e-5, rtol=0)
    engine.close()


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_pooling_and_normalization_are_as_configured(tmp_path: Path, pooling: str, normalize: bool) -> None:
    folder = save_model(tmp_path)
    add_modules(folder, "Pooling", *["Normalize"] * normalize, **{POOLING[pooling]: True})
    engine, collector = load(folder)
    engine.submit(job("r", *TEXTS))
    for text, vector in zip(TEXTS, vectors_of(collector, "r"), strict=True):
        torch.testing.assert_close(
            vector, plain(folder, text, pooling, normalize=normalize), atol=1e-5, rtol=0
        )
    engine.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_each_layer_of_a_pass_is_progress(tmp_path: Path, family: str) -> None:
    """A pass over one long input may take longer than a worker may be without progress."""
    engine, collector = load(save_model(tmp_path, family))
    before = engine.status().steps
    engine.submit(job("r", TEXTS[0]))
    collector.result("r")
    assert engine.status().steps == before + 1 + STEPS_OF_A_PASS, "and the job was tokenized"
    engine.close()


def test_a_vector_does_not_depend_on_what_shares_its_pass(
    engine: EmbeddingEngine, collector: Collector
) -> None:
    for place, text in enumerate(TEXTS):
        engine.submit(job(f"alone-{place}", text))
        collector.result(f"alone-{place}")
    engine.submit(job("all", *TEXTS))
    for place, vector in enumerate(vectors_of(collector, "all")):
        (alone,) = vectors_of(collector, f"alone-{place}")
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=0)


def test_many_requests_share_one_pass(engine: EmbeddingEngine, collector: Collector) -> None:
    before = engine.status().steps
    with engine._lock:
        for place in range(10):
            engine.submit(job(f"r{place}", "the quick brown", [4, 5]))
        assert engine.status().waiting == 10
    for place in range(10):
        result = collector.result(f"r{place}")
        assert result.usage == Usage(prompt_tokens=7, completion_tokens=0)
        assert len(result.events) == 2
    # each was tokenized, and all were computed once
    assert engine.status().steps == before + 10 + STEPS_OF_A_PASS
    assert engine.status().running == engine.status().waiting == 0


def test_a_job_that_is_tokenized_is_no_work_of_the_engine(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog would end a worker whose tokenizer has more to do than takes HANG_S."""
    assert engine._inputs is not None
    encode, entered, go_on = engine._inputs.encode, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        entered.set()
        go_on.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(engine._inputs, "encode", slowly)
    thread = threading.Thread(target=engine.submit, args=[job("r", TEXTS[0])])
    thread.start()
    assert entered.wait(60)
    status = engine.status()
    go_on.set()
    thread.join()
    collector.result("r")
    assert (status.running, status.waiting) == (0, 0)


def test_a_pass_is_bounded_in_tokens(weights: Path) -> None:
    engine, collector = load(weights, max_batch_tokens=64)
    before = engine.status().steps
    engine.submit(job("r", *["a b c d e f"] * 20))  # 8 tokens each, so 8 of them in a pass
    assert len(vectors_of(collector, "r")) == 20
    assert engine.status().steps == before + 1 + 3 * STEPS_OF_A_PASS
    engine.close()


def test_tokens_are_taken_as_they_are(engine: EmbeddingEngine, collector: Collector) -> None:
    engine.submit(job("text", "the cat"))
    places = [4 + WORDS.index("the"), 4 + WORDS.index("cat")]
    engine.submit(job("tokens", [2, *places, 3], places))
    (text,), (same, other) = vectors_of(collector, "text"), vectors_of(collector, "tokens")
    torch.testing.assert_close(same, text, atol=1e-6, rtol=0)
    assert (other - text).abs().max() > 1e-3


def test_a_cancelled_job_ends_at_once(engine: EmbeddingEngine, collector: Collector) -> None:
    with engine._lock:
        engine.submit(job("a", *TEXTS))
        engine.submit(job("b", *TEXTS))
        engine.submit(job("c", *TEXTS))
        engine.cancel("a", "cancelled")
        engine.cancel("b", "deadline")
        engine.cancel("unknown", "cancelled")
    assert collector.result("a").failed.code == Cancelled.code
    assert collector.result("b").failed.code == DeadlineExceeded.code
    assert len(vectors_of(collector, "c")) == len(TEXTS)
    assert [len(collector.events[name]) for name in ("a", "b")] == [1, 1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_that_is_cancelled_in_its_pass_gets_nothing_more(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    computing, cancelled = threading.Event(), threading.Event()
    compute = engine._vectors

    def wait(batch: Any) -> Any:
        computing.set()
        assert cancelled.wait(60)
        if fails and batch[0].request.job.id == "r":
            raise RuntimeError
        return compute(batch)

    monkeypatch.setattr(engine, "_vectors", wait)
    engine.submit(job("r", "a"))
    assert computing.wait(60)
    assert engine.status().running == 1
    engine.cancel("r", "cancelled")
    cancelled.set()
    engine.submit(job("next", "a"))
    vectors_of(collector, "next")
    assert [type(event).__name__ for event in collector.events["r"]] == ["Failed"]


def test_a_second_job_with_an_open_id_is_ignored(engine: EmbeddingEngine, collector: Collector) -> None:
    with engine._lock:
        engine.submit(job("r", "a"))
        engine.submit(job("r", "a", "b"))
    assert len(vectors_of(collector, "r")) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("secret"), EngineError.code),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory.code),
    ],
    ids=["error", "memory"],
)
def test_an_input_that_fails_fails_its_request_alone(
    engine: EmbeddingEngine,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: str,
) -> None:
    compute = engine._vectors
    poison = 4 + WORDS.index("mat")

    def fail(batch: Any) -> Any:
        if any(poison in item.tokens for item in batch):
            raise error
        return compute(batch)

    monkeypatch.setattr(engine, "_vectors", fail)
    with engine._lock:
        for name, text in {"a": "the cat", "b": "the mat", "c": "a dog", "d": "b dog"}.items():
            engine.submit(job(name, text))
    assert collector.result("b").failed.code == code
    assert [len(vectors_of(collector, name)) for name in "acd"] == [1, 1, 1]
    assert "secret" not in caplog.text


def test_a_vector_that_is_not_finite_is_an_error(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine._loaded is not None
    monkeypatch.setattr(
        type(engine._loaded), "vectors", lambda self, inputs: torch.full((len(inputs), 4), torch.nan)
    )
    engine.submit(job("r", "a"))
    assert collector.result("r").failed.code == EngineError.code


def test_closing_ends_what_is_open_and_refuses_the_rest(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, go_on = threading.Event(), threading.Event()
    compute = engine._vectors

    def wait(batch: Any) -> Any:
        computing.set()
        assert go_on.wait(60)
        return compute(batch)

    monkeypatch.setattr(engine, "_vectors", wait)
    engine.submit(job("running", "a"))
    assert computing.wait(60)
    engine.submit(job("waiting", "a"))
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert collector.result("running").failed.code == ShuttingDown.code
    assert collector.result("waiting").failed.code == ShuttingDown.code
    go_on.set()
    closing.join(60)
    engine.submit(job("late", "a"))
    assert collector.result("late").failed.code == ShuttingDown.code
    assert not engine.status().alive


def test_an_engine_whose_thread_dies_ends_its_jobs(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(batch: Any) -> Any:
        raise SystemExit

    monkeypatch.setattr(engine, "_compute", die)
    engine.submit(job("r", "a"))
    assert collector.result("r").failed.code == EngineStopped.code
    engine._thread.join(60)
    assert not engine.status().alive


class BrokenEmit:
    """Raises for the events of some requests, `times` times; the others go to a collector."""

    def __init__(self, collector: Collector, broken: set[str], times: int) -> None:
        self._collector, self._broken, self.times = collector, broken, times

    def __call__(self, events: Any) -> None:
        if self.times and any(request_id in self._broken for request_id, _ in events):
            self.times -= 1
            raise ConnectionError("lost")
        self._collector(events)


def test_vectors_that_are_lost_fail_their_requests_alone(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_emit", BrokenEmit(collector, {"lost"}, 1))
    engine.submit(job("lost", "a"))
    assert collector.result("lost").failed.code == EngineError.code
    engine.submit(job("other", "a"))
    assert len(vectors_of(collector, "other")) == 1


def test_a_request_whose_end_is_lost_keeps_no_other_from_its_own(
    engine: EmbeddingEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread ends, which the worker's watchdog sees."""
    watchdog = Watchdog(engine, 1000)
    watchdog.start()
    watchdog.check()

    def submit_others(batch: Any) -> list[bytes]:
        engine.submit(job("lost too", "a"))
        engine.submit(job("other", "a"))
        return [b""]

    monkeypatch.setattr(engine, "_emit", BrokenEmit(collector, {"lost", "lost too"}, 1000))
    monkeypatch.setattr(engine, "_vectors", submit_others)
    engine.submit(job("lost", "a"))
    assert collector.result("other").failed.code == EngineStopped.code
    engine._thread.join(60)
    with pytest.raises(EngineHung, match="the engine's thread has died"):
        watchdog.check()


@pytest.mark.parametrize(
    ("config", "options", "wanted", "message"),
    [
        ({}, {}, 8, "no Matryoshka model; leave `dimensions` out, or send 32"),
        ({"is_matryoshka": True}, {"matryoshka": False}, 8, "no Matryoshka model"),
        ({"is_matryoshka": True}, {}, 33, "dimensions must be at most 32 for this model (it is 33)"),
        ({"matryoshka_dimensions": [8, 16]}, {}, 9, "dimensions must be one of [8, 16, 32]"),
    ],
)
def test_dimensions_that_a_model_has_not_are_refused(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any], wanted: int, message: str
) -> None:
    engine, collector = load(save_model(tmp_path, **config), **options)
    engine.submit(job("r", "a", dimensions=wanted))
    failure = collector.result("r").failed
    assert failure.param == "dimensions" and message in failure.message
    engine.submit(job("own", "a", dimensions=SIZE))
    assert len(vectors_of(collector, "own")[0]) == SIZE
    engine.close()


@pytest.mark.parametrize(
    ("config", "options"),
    [({"is_matryoshka": True}, {}), ({"matryoshka_dimensions": [8]}, {}), ({}, {"matryoshka": True})],
)
def test_a_matryoshka_model_gives_the_first_numbers_normalized(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = add_modules(save_model(tmp_path, **config), "Pooling", "Normalize", pooling_mode="mean")
    engine, collector = load(folder, **options)
    with engine._lock:
        engine.submit(job("short", "the cat", dimensions=8))
        engine.submit(job("whole", "the cat"))
    (short,), (whole,) = vectors_of(collector, "short"), vectors_of(collector, "whole")
    torch.testing.assert_close(short, whole[:8] / whole[:8].norm(), atol=1e-6, rtol=0)
    engine.close()
