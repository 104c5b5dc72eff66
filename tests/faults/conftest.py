"""What the fault tests share: deployments of the echo engine, which needs no GPU, and readers of its streams.

Bounds are twice those promised in docs/operations.md, because machines are noisy.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Stream, wait_until

Starter = Callable[..., Deployment]


class Reader:
    """Reads one stream in a thread: what arrived, and how it ended."""

    def __init__(self, stream: Stream) -> None:
        assert stream.status == 200, stream.response.read()
        self.stream = stream
        self.parts: list[str] = []
        self.error: dict[str, Any] | None = None
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
                        if choice["delta"].get("content"):
                            self.parts.append(choice["delta"]["content"])
                    self._changed.notify_all()
        except (OSError, ValueError, AttributeError):
            return  # cut off, or closed by the test itself: `done` stays False
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
    """Return what the echo engine answers in `tokens` tokens."""
    return "".join(f"{n} " for n in range(tokens))


def read(service: Deployment, tokens: int, count: int = 1) -> list[Reader]:
    """Open `count` streams; return their readers once each stream has begun."""
    readers = [Reader(service.stream("count", "echo", max_tokens=tokens)) for _ in range(count)]
    for reader in readers:
        reader.wait_parts(1)
    return readers


def check_lost(reader: Reader, within_s: float) -> None:
    """Check that a stream ends with the error event of a lost worker."""
    reader.wait_end(within_s)
    assert not reader.done, "a cut stream must not look complete"
    assert reader.error is not None, "a cut stream must end with an error event"
    assert reader.error["error"]["code"] == "worker_lost"
    assert reader.error["code"] == 503


def wait_served(service: Deployment, timeout_s: float = 10) -> None:
    """Wait until a chat request succeeds."""
    wait_until(
        lambda: service.chat("hi", "echo", max_tokens=3)[0] == 200,
        timeout_s=timeout_s,
        what="a request succeeds",
    )


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
