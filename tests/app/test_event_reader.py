"""app.dispatch.dispatcher.EventReader: what a reader gets that comes late, or whose caller leaves."""

import time
from typing import Any

import pytest

from app.dispatch.dispatcher import DEADLINE_GRACE_S, EventReader
from protocol.errors import Cancelled, DeadlineExceeded, ShuttingDown, WorkerLost
from protocol.event_router import Inbox
from protocol.events import Delta, Envelope, Event, Failed, Finished, Started, Usage


class Caller:
    left = False

    def gone(self) -> bool:
        return self.left


def answer(
    *events: Event, late: bool = False, draining_for_s: float = 0.0
) -> tuple[EventReader, Caller, list[Any]]:
    """An answer whose inbox holds `events`, at a moment when its caller, deadline and server are looked at."""
    inbox = Inbox("r", "m")
    for seq, event in enumerate(events):
        inbox.feed(Envelope("r", seq, event))
    ends: list[Any] = []
    caller = Caller()
    made = EventReader(
        inbox,
        caller,
        ends_at=time.monotonic() - (DEADLINE_GRACE_S + 1 if late else -100),
        draining_for_s=lambda: draining_for_s,
        end=lambda inbox, complete: ends.append((inbox.request_id, complete)),
    )
    made._check_at = 0.0
    return made, caller, ends


def test_an_end_that_has_come_counts_however_late_it_is_read() -> None:
    events: list[Event] = [Delta("one", finish_reason="stop"), Finished(Usage(1, 1))]
    made, _, ends = answer(*events, late=True, draining_for_s=100)
    assert made.take() == events
    assert made.over
    made.close()
    assert ends == [("r", True)]


def test_a_failure_is_raised_after_what_came_before_it_and_not_as_a_deadline() -> None:
    made, _, ends = answer(Started("w"), Delta("one"), Failed("worker_lost", "it died"), late=True)
    assert made.take() == [Started("w"), Delta("one")]
    for _ in range(2):
        with pytest.raises(WorkerLost):
            made.take()
    made.close()
    assert ends == [("r", False)]


@pytest.mark.parametrize(
    ("kind", "late", "draining_for_s", "left"),
    [
        (DeadlineExceeded, True, 0.0, False),
        (ShuttingDown, False, 100.0, False),
        (Cancelled, False, 0.0, True),
    ],
)
def test_a_stream_that_never_falls_silent_is_looked_after_too(
    kind: type[Exception], late: bool, draining_for_s: float, left: bool
) -> None:
    made, caller, _ = answer(Started("w"), Delta("one"), late=late, draining_for_s=draining_for_s)
    caller.left = left
    with pytest.raises(kind):
        made.take()
