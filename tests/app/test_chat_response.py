"""app.chat.response and app.http.sse: the frames of a streamed chat, and how it ends. No socket, no Redis."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from app.chat.completion import completion
from app.chat.response import ARRIVING_S, ChatEventReader, ChunkEncoder, ChunkStream
from app.http.sse import COMMENT, COMMENT_AFTER_S, DONE, EventStream
from protocol.errors import Cancelled, DeadlineExceeded, WorkerLost
from protocol.events import (
    Delta,
    Event,
    Finished,
    ReasoningDelta,
    Started,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

END: list[Event] = [Delta("", tokens=0, finish_reason="stop"), Finished(Usage(3, 2))]


class Batches:
    """A reader of events from a list; raises the exceptions in it."""

    def __init__(self, batches: Iterable[list[Event] | Exception]) -> None:
        self._batches = list(batches)
        self.finished = False
        self.incomplete = False

    def next_events(self, wait_s: float = 1.0) -> list[Event]:
        batch = self._batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        self.finished = bool(batch) and isinstance(batch[-1], Finished)
        return batch


def stream(*batches: list[Event] | Exception, n: int = 1, clock: Any = lambda: 0.0) -> list[bytes]:
    encoder = ChunkEncoder("cmpl-1", "m", n=n, include_usage=False, timings=dict)
    chunks = ChunkStream(ChatEventReader(Batches(batches), n), encoder)
    return list(EventStream(chunks.next_frames, lambda: None, lambda error: None, clock))


def events(parts: list[bytes]) -> list[dict[str, Any]]:
    frames = b"".join(parts).split(b"\n\n")
    return [json.loads(f.removeprefix(b"data: ")) for f in frames if f.startswith(b"data: {")]


def test_a_complete_response_ends_with_done() -> None:
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


def test_events_in_one_batch_are_a_complete_response_too() -> None:
    parts = stream([Started("w"), Delta("one"), *END])
    assert parts[-1] == DONE
    assert len(events(parts)) == 3


@pytest.mark.parametrize("error", [WorkerLost("the worker died"), ValueError("a prompt")])
def test_a_failure_after_the_first_token_is_an_event_without_done(error: Exception) -> None:
    parts = stream([Delta("one")], error)
    assert DONE not in parts
    last = events(parts)[-1]
    assert last["code"] == 503 if isinstance(error, WorkerLost) else last["code"] == 500
    assert last["error"]["code"] and b"a prompt" not in parts[-1]


def test_nothing_is_sent_after_a_disconnect() -> None:
    parts = stream([Delta("one")], Cancelled("the client disconnected"))
    assert len(parts) == 1 and b"one" in parts[0]


def test_an_error_before_the_first_token_is_raised() -> None:
    with pytest.raises(WorkerLost):
        stream([Started("w")], [], WorkerLost("the worker died"))


def test_silence_is_filled_with_comments() -> None:
    seconds = iter(range(1000))
    silent: list[list[Event]] = [[] for _ in range(20)]
    parts = stream([Delta("one")], *silent, [Delta("two"), *END], clock=lambda: float(next(seconds)))
    comments = parts.count(COMMENT)
    # the clock is read once for each empty batch, and once more for each part that is sent
    assert 20 / (COMMENT_AFTER_S + 1) - 1 <= comments <= 20 / COMMENT_AFTER_S
    assert parts[-1] == DONE


def test_a_response_ends_at_the_deadline_even_if_the_worker_does_not_end_it() -> None:
    late = DeadlineExceeded("too late")
    ended = Delta("", 0, 0, "stop")
    parts = stream([Delta("one", 0), Delta("two", 1), ended], late, n=2)
    assert parts[-1] == DONE
    reasons = {c["index"]: c["finish_reason"] for e in events(parts) for c in e["choices"]}
    assert reasons == {0: "stop", 1: "length"}
    assert events(parts)[-1]["usage"]["completion_tokens"] == 2
    plain = completion(ChatEventReader(Batches([[Delta("one", 0)], late]), 1), "cmpl-1", "m", n=1)
    assert plain["choices"][0]["finish_reason"] == "length" and plain["usage"]["completion_tokens"] == 1


def test_a_response_that_was_broken_off_before_the_deadline_is_an_error_and_not_a_length() -> None:
    now = 0.0
    reader = Batches([[Delta("one", 0)], DeadlineExceeded("too late")])
    chat = ChatEventReader(reader, 1, lambda: now)
    chat.next_events()
    now += ARRIVING_S + 1
    with pytest.raises(DeadlineExceeded):
        chat.next_events()


def test_a_response_with_a_gap_is_an_error_at_the_deadline() -> None:
    reader = Batches([[Delta("one", 0)], DeadlineExceeded("too late")])
    reader.incomplete = True
    chat = ChatEventReader(reader, 1)
    chat.next_events()
    with pytest.raises(DeadlineExceeded):
        chat.next_events()


def test_without_a_token_the_deadline_is_an_error() -> None:
    with pytest.raises(DeadlineExceeded):
        stream([Started("w")], DeadlineExceeded("too late"))


def plain(*batches: list[Event], n: int = 1) -> dict[str, Any]:
    return completion(ChatEventReader(Batches(batches), n), "cmpl-1", "m", n=n)


THOUGHT: list[Event] = [
    ReasoningDelta("two and "),
    ReasoningDelta("two"),
    Delta("four", finish_reason="stop"),
]


def test_reasoning_has_a_field_of_its_own() -> None:
    usage = Finished(Usage(3, 3, 0, 2))
    found = events(stream([*THOUGHT, usage]))
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant"},
        {"reasoning_content": "two and "},
        {"reasoning_content": "two"},
        {"content": "four"},
        {"content": ""},
    ]
    body = plain([*THOUGHT, usage])
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "four",
        "reasoning_content": "two and two",
    }
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert found[-1]["usage"] == body["usage"]


def test_without_reasoning_an_answer_has_no_trace_of_it() -> None:
    body = plain([Delta("four", finish_reason="stop"), Finished(Usage(3, 1))])
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "four"}
    assert "completion_tokens_details" not in body["usage"]


def test_reasoning_of_several_choices_is_kept_apart() -> None:
    batch: list[Event] = [ReasoningDelta("a", 1), ReasoningDelta("b", 0), ReasoningDelta("c", 1)]
    ends: list[Event] = [Delta("x", 0, 1, "stop"), Delta("", 1, 0, "length"), Finished(Usage(1, 4))]
    body = plain([*batch, *ends], n=2)
    assert [choice["message"].get("reasoning_content") for choice in body["choices"]] == ["b", "ac"]
    found = events(stream([*batch, *ends], n=2))
    deltas = [
        choice for event in found for choice in event["choices"] if "reasoning_content" in choice["delta"]
    ]
    assert [(choice["index"], choice["delta"]["reasoning_content"]) for choice in deltas] == [
        (1, "a"),
        (0, "b"),
        (1, "c"),
    ]


def test_reasoning_has_logprobs() -> None:
    batch: list[Event] = [
        ReasoningDelta("a", logprobs=[TokenLogprob("a", -1.0, [97])]),
        Delta("b", finish_reason="stop", logprobs=[TokenLogprob("b", -2.0, [98])]),
        Finished(Usage(1, 2)),
    ]
    content = plain(batch)["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["a", "b"]
    found = [event["choices"][0] for event in events(stream(batch))]
    assert found[1]["logprobs"]["content"] == content[:1]


def test_an_answer_that_is_cut_inside_its_reasoning_at_the_deadline_is_a_length() -> None:
    body = completion(
        ChatEventReader(Batches([[ReasoningDelta("hm")], DeadlineExceeded("too late")]), 1), "i", "m", n=1
    )
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["message"]["content"] == ""


CALLS: list[Event] = [
    Delta("Let me look."),
    ToolCallDelta(0, id="abc123456", name="weather"),
    ToolCallDelta(0, arguments='{"city": '),
    ToolCallDelta(0, arguments='"Rome"}'),
    ToolCallDelta(1, id="abc123457", name="now"),
    ToolCallDelta(1, arguments="{}"),
    Delta("", tokens=1, finish_reason="tool_calls"),
    Finished(Usage(3, 7)),
]


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_calls_are_streamed_as_openai_streams_them() -> None:
    found = events(stream(CALLS))
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant"},
        {"content": "Let me look."},
        {"tool_calls": [{"index": 0, **call("abc123456", "weather", "")}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
        {"tool_calls": [{"index": 1, **call("abc123457", "now", "")}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {"content": ""},
    ]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_whole_answer_has_its_calls_beside_its_content() -> None:
    choice = plain(CALLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [call("abc123456", "weather", '{"city": "Rome"}'), call("abc123457", "now", "{}")],
    }


def test_calls_without_text_have_null_as_content() -> None:
    assert plain(CALLS[1:])["choices"][0]["message"]["content"] is None


def test_a_call_that_is_no_json_is_left_out_of_a_whole_answer() -> None:
    broken: list[Event] = [ToolCallDelta(0, id="1", name="f"), ToolCallDelta(0, arguments='{"a"')]
    good: list[Event] = [ToolCallDelta(1, id="2", name="g"), ToolCallDelta(1, arguments="{}")]
    rest: list[Event] = [Delta('f({"a"'), *good, *CALLS[-2:]]
    message = plain([*broken, *rest])["choices"][0]["message"]
    assert message["tool_calls"] == [call("2", "g", "{}")] and message["content"] == 'f({"a"'


def test_a_call_that_is_cut_at_the_end_stays_in_the_answer() -> None:
    cut: list[Event] = [ToolCallDelta(0, id="1", name="f"), ToolCallDelta(0, arguments='{"a"')]
    choice = plain([*cut, Delta("", tokens=0, finish_reason="length"), Finished(Usage(1, 2))])["choices"][0]
    assert choice["message"]["tool_calls"] == [call("1", "f", '{"a"')]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] is None


def test_a_call_that_is_no_json_stays_out_of_an_answer_that_is_cut_later() -> None:
    broken: list[Event] = [ToolCallDelta(0, id="1", name="f"), ToolCallDelta(0, arguments='{"a"')]
    text: list[Event] = [Delta('f({"a" 1})'), Delta(" Well")]
    ends: list[Event] = [Delta("", tokens=0, finish_reason="length"), Finished(Usage(1, 4))]
    message = plain([*broken, *text, *ends])["choices"][0]["message"]
    assert message == {"role": "assistant", "content": 'f({"a" 1}) Well'}
    cut: list[Event] = [ToolCallDelta(1, id="2", name="g"), ToolCallDelta(1, arguments='{"b')]
    message = plain([*broken, *text, *cut, *ends])["choices"][0]["message"]
    assert message["tool_calls"] == [call("2", "g", '{"b')] and message["content"] == 'f({"a" 1}) Well'
