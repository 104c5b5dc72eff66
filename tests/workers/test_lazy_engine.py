"""workers.engines.LazyEngine before and after its engine is made."""

import queue
import subprocess
import sys
from collections.abc import Sequence

import pytest

from catalogue import Catalogue
from protocol.events import Event, Finished
from protocol.jobs import ChatJob, SamplingParams
from workers.engines import LazyEngine
from workers.engines.base import EngineStatus

CATALOGUE = Catalogue.model_validate(
    {"project": "P", "models": [{"name": "m", "tasks": ["chat"], "weights": "echo:tokens=2"}]}
)
JOB = ChatJob(
    id="a", model="m", messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams(max_tokens=2)
)


def test_before_the_load_it_is_not_alive_and_takes_no_job() -> None:
    engine = LazyEngine(CATALOGUE.models[0])
    assert engine.status() == EngineStatus(alive=False, running=0, waiting=0, steps=0)
    engine.cancel("a", "cancelled")
    engine.close()
    with pytest.raises(RuntimeError, match="before the engine was loaded"):
        engine.submit(JOB)


def test_after_the_load_it_is_the_engine_of_its_entry() -> None:
    engine = LazyEngine(CATALOGUE.models[0])
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(gained: Sequence[tuple[str, Event]]) -> None:
        for _, event in gained:
            events.put(event)

    engine.load(emit)
    engine.submit(JOB)
    while not isinstance(event := events.get(timeout=30), Finished):
        pass
    assert event.usage is not None and event.usage.completion_tokens == 2
    assert engine.status().alive
    engine.close()
    assert not engine.status().alive


def test_making_a_chat_engine_imports_no_torch() -> None:
    code = """
import sys
from catalogue import Catalogue
from workers.engines import LazyEngine
models = [{"name": "m", "tasks": ["chat"], "weights": "w"}]
LazyEngine(Catalogue.model_validate({"project": "P", "models": models}).models[0]).status()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
