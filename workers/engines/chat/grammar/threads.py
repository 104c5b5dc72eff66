"""Compiles in threads of their own, a few at once, and keeps those who wait from filling the worker."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from protocol.errors import Cancelled, EngineError, InvalidRequest, Overloaded

T = TypeVar("T")

LIMIT_S = 5.0
"""Time to compile a grammar. Within the bounds (bounds.py) it takes milliseconds, at most a second."""

THREADS = 2
"""How many grammars are compiled at once. Native code that exceeds its time goes on: it can't be stopped."""

BURST_S = 2.0
"""How long any number of requests may wait for a thread. Each of them holds one of the worker's tasks."""

WAITING = 4
"""How many requests may wait longer than BURST_S."""

QUEUE_S = 20.0
POLL_S = 0.1


class CompileThreads:
    """A request waits for a thread, and then for its result, until it is cancelled."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(THREADS)
        self._waiting = threading.BoundedSemaphore(WAITING)

    def run(
        self,
        work: Callable[[Callable[[], bool]], T],
        param: str,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> T:
        """Return what `work` returns. It is called with a function that says whether nobody waits any more.

        `param`: the field of the request. Raises what `work` does, EngineError for a panic of llguidance,
        InvalidRequest after LIMIT_S, Overloaded if no thread becomes free, and Cancelled.
        """
        self._take_slot(cancelled)
        done: Future[T] = Future()
        abandoned = threading.Event()

        def run() -> None:
            try:
                done.set_result(work(abandoned.is_set))
            except BaseException as error:
                # a panic of llguidance is no Exception
                done.set_exception(error if isinstance(error, Exception) else EngineError())
            finally:
                self._slots.release()

        threading.Thread(target=run, name="grammar", daemon=True).start()
        try:
            return _result(done, param, cancelled)
        finally:
            abandoned.set()

    def _take_slot(self, cancelled: Callable[[], bool]) -> None:
        if self._acquire(BURST_S, cancelled):
            return
        if self._waiting.acquire(blocking=False):
            try:
                if self._acquire(QUEUE_S - BURST_S, cancelled):
                    return
            finally:
                self._waiting.release()
        raise Overloaded("too many requests for structured output are being prepared; try again later")

    def _acquire(self, seconds: float, cancelled: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while not self._slots.acquire(timeout=POLL_S):
            if cancelled():
                raise Cancelled
            if time.monotonic() > deadline:
                return False
        return True


def _result(done: "Future[T]", param: str, cancelled: Callable[[], bool]) -> T:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return done.result(min(POLL_S, LIMIT_S))
        except TimeoutError:
            if done.done():
                return done.result()
            if cancelled():
                raise Cancelled from None
            if time.monotonic() > deadline:
                raise InvalidRequest(
                    f"{param} takes too long to prepare; make it simpler", param=param
                ) from None
