"""What the fault tests share: a deployment whose engine counts aloud instead of using a GPU, and readers of streams.

Bounds are those of the promises in docs/operations.md, doubled: machines are noisy.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Stream

Starter = Callable[..., Deployment]


class Reader:
    """Reads one stream in a thread: what came, when, and how it ended."""

    def __init__(self, stream: Stream) -> None:
        assert stream.status == 200, stream.response.read()
        self.stream = stream
        self.parts: list[str] = []
        self.arrived: list[float] = []
        self.error: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self._changed = threading.Condition()
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for event in self.stream.events():
                with self._changed:
                    if "error" in event:
                        self.error = event
                    else:
                        (choice,) = event["choices"]
                        self.finish_reason = choice["finish_reason"]
                        if choice["delta"].get("content"):
                            self.parts.append(choice["delta"]["content"])
                            self.arrived.append(time.monotonic())
                    self._changed.notify_all()
        except (OSError, ValueError, AttributeError):
            # cut off, or closed by the test itself: `done` stays False
            self.cut = True
        finally:
            self.ended.set()
            with self._changed:
                self._changed.notify_all()

    def wait_parts(self, count: int, timeout_s: float = 30) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.parts) >= count or self.ended.is_set(), timeout_s)
            assert len(self.parts) >= count, f"ended after {self.parts[-3:]} with {self.error}"

    def wait_end(self, timeout_s: float) -> None:
        assert self.ended.wait(timeout_s), f"still open after {timeout_s} s, {len(self.parts)} parts"

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def done(self) -> bool:
        return self.stream.done


def counted(tokens: int) -> str:
    """What the echo engine says in `tokens` tokens."""
    return "".join(f"{n} " for n in range(tokens))


def read(service: Deployment, tokens: int, count: int = 1) -> list[Reader]:
    """Open streams and wait until each has begun."""
    readers = [Reader(service.stream("count", "echo", max_tokens=tokens)) for _ in range(count)]
    for reader in readers:
        reader.wait_parts(1)
    return readers


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts deployments: `start(workers=2, step_ms=20, slots=16, **environment)`."""
    with ExitStack() as stack:

        def starter(
            *, workers: int = 1, step_ms: float = 20, slots: int = 16, **environment: str
        ) -> Deployment:
            catalogue = ECHO_CATALOGUE.format(step_ms=step_ms, slots=slots)
            service = stack.enter_context(
                Deployment(tmp_path, catalogue=catalogue, redis_server=None, **environment)
            )
            return service.start(*["echo"] * workers)

        yield starter
