"""app.dispatch.timings: what the events of a request tell of its times."""

from app.dispatch.timings import Timings
from protocol.events import (
    Delta,
    Event,
    Failed,
    Finished,
    ImageReady,
    Progress,
    ReasoningDelta,
    Started,
    Usage,
)


def timings_of(*batches: list[Event]) -> Timings:
    """A clock that goes on by a second with each batch."""
    now = 0.0
    timings = Timings(clock=lambda: now)
    for batch in batches:
        now += 1
        timings.note(batch)
    return timings


def test_nothing_is_known_before_a_worker_has_the_request() -> None:
    timings = timings_of([], [])
    assert timings.queued_s is None and timings.first_token_s is None


def test_the_queue_ends_with_the_claim_and_the_first_token_counts() -> None:
    timings = timings_of([Started("w")], [], [Delta("one")], [Delta("two"), Finished()])
    assert (timings.queued_s, timings.first_token_s) == (1, 3)
    timings = timings_of([], [Started("w"), ReasoningDelta("one")])
    assert (timings.queued_s, timings.first_token_s) == (2, 2)


def test_images_and_failures_have_no_first_token() -> None:
    image = ImageReady(0, 0, 64, 64)
    for events in ([Progress(1, 2), image, Finished()], [Failed("engine_error", "no")]):
        assert timings_of([Started("w")], [*events]).first_token_s is None


def test_the_outcome_names_worker_tokens_and_images() -> None:
    chat = timings_of([Started("gpu0:1")], [Delta("one")], [Delta("two"), Finished(Usage(3, 2))])
    assert (chat.incarnation_id, chat.usage, chat.images) == ("gpu0:1", Usage(3, 2), 0)
    ready = [ImageReady(number, 0, 64, 64) for number in range(2)]
    images = timings_of([Started("gpu1:1")], [Progress(1, 2), ready[0]], [ready[1], Finished()])
    assert (images.incarnation_id, images.usage, images.images) == ("gpu1:1", None, 2)
    waiting = timings_of([], [])
    assert (waiting.incarnation_id, waiting.usage, waiting.images) == (None, None, 0)


def test_a_client_gets_whole_milliseconds_of_what_is_known() -> None:
    timings = timings_of([Started("w")], [Delta("one")])
    assert timings.milliseconds() == {"queued_ms": 1000, "first_token_ms": 2000, "total_ms": 2000}
    assert timings_of([Started("w")], [Finished()]).milliseconds() == {"queued_ms": 1000, "total_ms": 2000}


def test_the_tokens_of_all_jobs_of_a_request_count() -> None:
    timings = timings_of([Started("w"), Finished(Usage(1, 2, 1))], [Finished()], [Finished(Usage(10, 20))])
    assert timings.usage == Usage(11, 22, 1)
