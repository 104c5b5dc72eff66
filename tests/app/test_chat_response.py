"""A streamed chat from events to frames: what is sent, and how it ends. No socket, no Redis."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from app.chat.response import ChatAnswer, ChunkEncoder, ChunkStream, completion
from app.http.sse import COMMENT, COMMENT_AFTER_S, DONE, EventStream
from protocol.errors import Cancelled, DeadlineExceeded, WorkerLost
from protocol.events import Delta, Event, Finished, Started, Usage

END: list[Event] = [Delta("", tokens=0, finish_reason="stop"), Finished(Usage(3, 2))]


class Batches:
    """What app.dispatch.dispatcher.EventReader gives, from a list; an exception in it is raised."""

    def __init__(self, batches: Iterable[list[Event] | Exception]) -> None:
        self._batches = list(batches)
        self.over = False

    def take(self) -> list[Event]:
        batch = self._batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        self.over = bool(batch) and isinstance(batch[-1], Finished)
        return batch


def stream(*batches: list[Event] | Exception, n: int = 1, clock: Any = lambda: 0.0) -> list[bytes]:
    encoder = ChunkEncoder("cmpl-1", "m", n=n, include_usage=False)
    chunks = ChunkStream(ChatAnswer(Batches(batches), n), encoder)
    return list(EventStream(chunks.take, lambda: None, clock))


def events(parts: list[bytes]) -> list[dict[str, Any]]:
    frames = b"".join(parts).split(b"\n\n")
    return [json.loads(f.removeprefix(b"data: ")) for f in frames if f.startswith(b"data: {")]


def test_a_complete_answer_ends_with_done() -> None:
    parts = stream([Started("w")], [Delta("one ")], [], [Delta("two"), *END])
    assert parts[-1] == DONE
    found = events(parts)
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant"},
        {"content": "one "},
        {"content": "two"},
        {"content": ""},
    ]
    assert found[-1]["usage"]["completion_tokens"] == 2


def test_all_in_one_batch_is_a_complete_answer_too() -> None:
    parts = stream([Started("w"), Delta("one"), *END])
    assert parts[-1] == DONE
    assert len(events(parts)) == 3


@pytest.mark.parametrize("error", [WorkerLost("the worker died"), ValueError("a prompt")])
def test_a_failure_in_mid_answer_is_an_event_and_no_done(error: Exception) -> None:
    parts = stream([Delta("one")], error)
    assert DONE not in parts
    last = events(parts)[-1]
    assert last["code"] == 503 if isinstance(error, WorkerLost) else last["code"] == 500
    assert last["error"]["code"] and b"a prompt" not in parts[-1]


def test_a_caller_who_left_gets_nothing_more() -> None:
    parts = stream([Delta("one")], Cancelled("the caller has left"))
    assert len(parts) == 1 and b"one" in parts[0]


def test_an_error_before_the_first_token_is_raised() -> None:
    with pytest.raises(WorkerLost):
        stream([Started("w")], [], WorkerLost("the worker died"))


def test_silence_is_filled_with_comments() -> None:
    seconds = iter(range(1000))
    silent: list[list[Event]] = [[] for _ in range(20)]
    parts = stream([Delta("one")], *silent, [Delta("two"), *END], clock=lambda: float(next(seconds)))
    comments = parts.count(COMMENT)
    # the clock is read once for each second of silence, and once more for each part
    assert 20 / (COMMENT_AFTER_S + 1) - 1 <= comments <= 20 / COMMENT_AFTER_S
    assert parts[-1] == DONE


def test_a_worker_that_misses_the_deadline_still_ends_the_answer_properly() -> None:
    late = DeadlineExceeded("too late")
    ended = Delta("", 0, 0, "stop")
    parts = stream([Delta("one", 0), Delta("two", 1), ended], late, n=2)
    assert parts[-1] == DONE
    reasons = {c["index"]: c["finish_reason"] for e in events(parts) for c in e["choices"]}
    assert reasons == {0: "stop", 1: "length"}
    assert events(parts)[-1]["usage"]["completion_tokens"] == 2
    plain = completion(ChatAnswer(Batches([[Delta("one", 0)], late]), 1), "cmpl-1", "m", n=1)
    assert plain["choices"][0]["finish_reason"] == "length" and plain["usage"]["completion_tokens"] == 1


def test_without_a_token_the_deadline_is_an_error() -> None:
    with pytest.raises(DeadlineExceeded):
        stream([Started("w")], DeadlineExceeded("too late"))
