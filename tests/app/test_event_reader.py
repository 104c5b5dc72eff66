"""app.dispatch.event_reader.EventReader: reads after the deadline, during a shutdown, after a disconnect."""

import time
from typing import Any

import pytest

from app.dispatch.event_reader import DEADLINE_GRACE_S, EventReader
from protocol.errors import (
    Cancelled,
    CancelledByOperator,
    DeadlineExceeded,
    Interrupted,
    ShuttingDown,
    WorkerLost,
)
from protocol.event_router import Inbox
from protocol.events import Delta, Envelope, Event, Failed, Finished, Started, Usage


class Client:
    left = False

    def disconnected(self) -> bool:
        return self.left


def reader_of(
    *events: Event, late: bool = False, draining_for_s: float = 0.0, by_operator: bool = False
) -> tuple[EventReader, Client, list[Any]]:
    """A reader whose inbox holds `events`; its next call checks client, deadline and server."""
    inbox = Inbox("r", "m")
    for seq, event in enumerate(events):
        inbox.feed(Envelope("r", seq, event))
    closed: list[Any] = []
    client = Client()
    reader = EventReader(
        inbox,
        client,
        ends_at=time.monotonic() - (DEADLINE_GRACE_S + 1 if late else -100),
        draining_for_s=lambda: draining_for_s,
        on_close=lambda inbox, finished: closed.append((inbox.request_id, finished)),
        cancelled_by_operator=lambda request_id: by_operator and request_id == "r",
    )
    reader._check_at = 0.0
    return reader, client, closed


def test_a_terminal_event_that_has_arrived_wins_over_an_expired_deadline() -> None:
    events: list[Event] = [Delta("one", finish_reason="stop"), Finished(Usage(1, 1))]
    reader, _, closed = reader_of(*events, late=True, draining_for_s=100)
    assert reader.next_events() == events
    assert reader.finished
    reader.close()
    assert closed == [("r", True)]


def test_a_failure_is_raised_after_the_events_before_it_and_wins_over_the_deadline() -> None:
    reader, _, closed = reader_of(Started("w"), Delta("one"), Failed("worker_lost", "it died"), late=True)
    assert reader.next_events() == [Started("w"), Delta("one")]
    for _ in range(2):
        with pytest.raises(WorkerLost):
            reader.next_events()
    reader.close()
    assert closed == [("r", False)]


@pytest.mark.parametrize(
    ("kind", "late", "draining_for_s", "left"),
    [
        (DeadlineExceeded, True, 0.0, False),
        (ShuttingDown, False, 100.0, False),
        (Cancelled, False, 0.0, True),
    ],
)
def test_a_stream_that_is_never_silent_is_checked_too(
    kind: type[Exception], late: bool, draining_for_s: float, left: bool
) -> None:
    reader, client, _ = reader_of(Started("w"), Delta("one"), late=late, draining_for_s=draining_for_s)
    client.left = left
    with pytest.raises(kind):
        reader.next_events()


def test_a_cancelled_request_whose_client_is_still_there_was_interrupted() -> None:
    reader, client, _ = reader_of(Started("w"), Failed.of(Cancelled()))
    assert reader.next_events() == [Started("w")]
    with pytest.raises(Interrupted) as error:
        reader.next_events()
    assert error.value.status == 503
    client.left = True
    with pytest.raises(Cancelled):
        reader.next_events()


def test_a_request_that_an_operator_cancelled_is_not_sent_again() -> None:
    reader, _, _ = reader_of(Started("w"), Failed.of(Cancelled()), by_operator=True)
    assert reader.next_events() == [Started("w")]
    with pytest.raises(CancelledByOperator) as error:
        reader.next_events()
    assert not error.value.may_retry


def test_a_gap_makes_the_stream_incomplete() -> None:
    reader, _, _ = reader_of(Started("w"))
    assert not reader.incomplete
    reader._inbox.feed(Envelope("r", 5, Delta("late")))
    assert reader.incomplete
