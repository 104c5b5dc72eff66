"""app.chat.resumable.NumberedChunks: a stream that is cut anywhere and continued is the whole stream."""

from collections.abc import Sequence

import pytest

from app.chat.response import ChatEventReader, ChunkEncoder, ChunkStream
from app.chat.resumable import NumberedChunks
from app.http.sse import DONE, EventStream
from protocol.errors import WorkerLost
from protocol.events import Delta, Event, Finished, ReasoningDelta, Started, ToolCallDelta, Usage
from tests.app.test_chat_response import Batches

EVENTS: list[Event] = [
    Started("w"),
    ReasoningDelta("first\n\nthink"),
    Delta("one\r\n\r\n"),
    Delta("two", index=1),
    ToolCallDelta(0, id="call-1", name="f", arguments='{"a":'),
    ToolCallDelta(0, arguments="1}"),
    Delta("", tokens=0),
    Delta("", tokens=0, finish_reason="tool_calls"),
    Delta(" three", index=1, finish_reason="stop"),
    Finished(Usage(3, 7)),
]


def frames(
    batches: Sequence[list[Event] | Exception], *, skip: int = 0, include_usage: bool = True
) -> list[bytes]:
    """The frames of the stream, [DONE] or an error included, after the first `skip` chunks."""
    encoder = ChunkEncoder("cmpl-1", "m", n=2, include_usage=include_usage, timings=dict, created=1)
    chunks = NumberedChunks(ChunkStream(ChatEventReader(Batches(batches), 2), encoder), skip)
    sent = b"".join(EventStream(chunks.next_frames, lambda: None, lambda error: None))
    return [frame + b"\n\n" for frame in sent.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_cut_after_any_chunk_is_continued_without_a_difference(include_usage: bool) -> None:
    whole = frames([[event] for event in EVENTS], include_usage=include_usage)
    chunks = len(whole) - 1
    assert [frame.partition(b"\n")[0] for frame in whole] == [
        *(b"id: %d" % (1 + place) for place in range(chunks)),
        DONE.strip(),
    ]
    assert b'"usage":{' in whole[-2]
    for after in range(chunks + 1):
        # a replay list comes in one batch, as far as it goes
        for size in (len(EVENTS), 1, 4):
            batches = [EVENTS[:size], *([event] for event in EVENTS[size:])]
            assert frames(batches, skip=after, include_usage=include_usage) == whole[after:]


def test_a_number_beyond_the_end_leaves_the_end() -> None:
    assert frames([EVENTS], skip=1000) == [DONE]


def test_a_failure_has_no_number() -> None:
    whole = frames([EVENTS[:3], WorkerLost()])
    assert b"id: " not in whole[-1] and b"worker_lost" in whole[-1]
