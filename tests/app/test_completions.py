"""app.chat.text_* and joined_reader: the fields of a completion, its jobs, and the answers.

No socket, no Redis.
"""

import json
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from app.chat import joined_reader
from app.chat.joined_reader import JoinedReader
from app.chat.response import ChunkStream
from app.chat.text_logprobs import TextLogprobs
from app.chat.text_response import TextChunkEncoder, text_completion
from app.chat.text_schema import MAX_CHOICES, MAX_PROMPT_TOKENS, MAX_PROMPTS, CompletionRequest
from app.chat.tokens_schema import DetokenizeRequest, TokenizeRequest
from app.dispatch.event_reader import EventReader
from app.http.validation import parse
from catalogue import ChatModelEntry
from protocol.errors import DeadlineExceeded, InvalidRequest, UnsupportedParameter, WorkerLost
from protocol.event_router import Inbox, new_signal
from protocol.events import (
    Delta,
    Echo,
    Envelope,
    Event,
    Failed,
    Finished,
    Started,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from protocol.jobs import ChatJob, CompletionJob, SamplingParams, TokenizeJob, decode, encode, work_of


def entry(**defaults: object) -> ChatModelEntry:
    return ChatModelEntry.model_validate(
        {"name": "chat", "tasks": ["chat"], "weights": "w", "defaults": defaults}
    )


def jobs(defaults: dict[str, Any] | None = None, **body: Any) -> list[CompletionJob]:
    request = parse(CompletionRequest, {"model": "chat", "prompt": "a", **body})
    return request.to_jobs("id", entry(**defaults or {}))


def refusal(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        jobs(**body)
    return caught.value


# ----- requests


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": ["a" * 2048] * 16, "n": 64, "logprobs": 20}, 2048 // 4 * 16 * 64 * 22),
        ({"prompt": [[1] * 513] * 16, "n": 64, "logprobs": 0}, 513 * 16 * 64 * 2),
        ({"prompt": "a" * 2**18, "n": 128}, 2**16 * 128),
    ],
    ids=["logprobs", "tokens", "text"],
)
def test_a_small_request_can_not_make_a_huge_answer(body: dict[str, Any], tokens: int) -> None:
    refused = refusal(**body, echo=True)
    assert refused.param == "echo" and f"{tokens:,} tokens" in refused.message
    assert jobs(**body, echo=False)


def test_harnesses_may_score_many_long_prompts() -> None:
    assert len(jobs(prompt=[[1] * 2048] * 128, echo=True, logprobs=1, max_tokens=0)) == 128
    assert jobs(prompt="a" * 2**22, echo=True)


def test_a_bare_request_has_openais_length_and_the_models_own_sampling() -> None:
    assert jobs() == [
        CompletionJob(id="id", model="chat", prompt="a", sampling=SamplingParams(max_tokens=16))
    ]
    # the catalogue's is for chats
    assert jobs({"max_tokens": 7, "temperature": 0.5})[0].sampling == SamplingParams(
        max_tokens=16, temperature=0.5
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_each_prompt_is_a_job(prompt: Any, expected: list[Any]) -> None:
    made = jobs(prompt=prompt, n=2, echo=True, logprobs=3, max_tokens=0)
    assert [job.prompt for job in made] == expected
    assert len({job.id for job in made}) == len(made) and all(job.id.startswith("id") for job in made)
    for job in made:
        assert job.echo and job.sampling == SamplingParams(n=2, logprobs=3, max_tokens=0)
        assert decode(*encode(job)) == job
        assert work_of(job) == 2.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [1, True]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [[1], "a"]}, "prompt.1"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": [1] * (MAX_PROMPT_TOKENS + 1)}, "prompt"),
        ({"prompt": ["a"] * MAX_PROMPTS, "n": MAX_CHOICES // MAX_PROMPTS + 1}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_bounds(body: dict[str, Any], param: str) -> None:
    assert refusal(**body).param == param


@pytest.mark.parametrize(
    ("name", "refused", "neutral"),
    [
        ("suffix", "x", ""),
        ("best_of", 2, 1),
        ("best_of", True, 1),
        ("prompt_logprobs", 0, None),
        ("use_beam_search", True, False),
    ],
)
def test_fields_that_are_not_supported(name: str, refused: Any, neutral: Any) -> None:
    error = refusal(**{name: refused})
    assert isinstance(error, UnsupportedParameter) and error.param == name and name in error.message
    assert jobs(**{name: neutral}) == jobs()


def test_what_can_be_tokenized() -> None:
    def job(**body: Any) -> TokenizeJob:
        return parse(TokenizeRequest, body).to_job("id", entry())

    assert job(prompt="a") == TokenizeJob(id="id", model="chat", text="a")
    user = {"role": "user", "content": "hi"}
    made = job(messages=[user], add_generation_prompt=False, return_token_strs=True)
    chat = ChatJob(id="", model="chat", messages=[user], sampling=SamplingParams())
    assert made == TokenizeJob(
        id="id", model="chat", chat=chat, add_generation_prompt=False, with_strings=True
    )
    assert decode(*encode(made)) == made and work_of(made) == 0
    for bad, param in (
        ({}, None),
        ({"prompt": "a", "messages": [user]}, None),
        ({"messages": [user], "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [user], "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "chat_template": "{{x}}"}, "chat_template"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            job(**bad)
        assert caught.value.param == param
    with pytest.raises(InvalidRequest):
        parse(DetokenizeRequest, {"tokens": [1, -1]})


# ----- logprobs


def token(text: str, logprob: float | None = -1.0, *top: tuple[str, float], own: bytes = b"") -> TokenLogprob:
    alternatives = [TopLogprob(other, value, list(other.encode())) for other, value in top]
    return TokenLogprob(text, logprob, list(own or text.encode()), alternatives)


def test_offsets_count_the_characters_of_the_text() -> None:
    made = TextLogprobs()
    made.begin("né, né")
    parts = [
        token("<s>", None),
        token(" n"),
        token("\ufffd", own=b"\xc3"),
        token("\ufffd", own=b"\xa9"),
        token(","),
    ]
    body = made.of_prompt([*parts, token(" né")])
    assert body["text_offset"] == [0, 0, 1, 1, 2, 3]
    assert made.of_answer([token(" x"), token("y")])["text_offset"] == [6, 8]
    assert TextLogprobs().of_answer([token("ab"), token("c")])["text_offset"] == [0, 2]


def test_alternatives_have_the_token_itself_and_the_best_of_equal_texts() -> None:
    body = TextLogprobs().of_answer(
        [token("a", -3.0, ("b", -1.0), ("b", -2.0)), token("b", -1.0, ("b", -1.0))]
    )
    assert body["top_logprobs"] == [{"b": -1.0, "a": -3.0}, {"b": -1.0}]
    assert body["token_logprobs"] == [-3.0, -1.0] and body["tokens"] == ["a", "b"]
    assert TextLogprobs().of_prompt([token("a", None)])["top_logprobs"] == [None]


# ----- answers of several prompts


next_events = EventReader.next_events


class Connected:
    def disconnected(self) -> bool:
        return False


class Jobs:
    """Real inboxes and readers of some jobs, which a test feeds."""

    def __init__(self, count: int) -> None:
        signal = new_signal()
        self.inboxes = [Inbox(f"r-{place}", "m", signal) for place in range(count)]
        self.closed: list[tuple[str, bool]] = []
        self.readers = [
            EventReader(
                inbox,
                Connected(),
                ends_at=float("inf"),
                draining_for_s=lambda: 0.0,
                on_close=lambda inbox, finished: self.closed.append((inbox.request_id, finished)),
                cancelled_by_operator=lambda request_id: False,
            )
            for inbox in self.inboxes
        ]

    def feed(self, place: int, *events: Event) -> None:
        inbox = self.inboxes[place]
        for event in events:
            inbox.feed(Envelope(inbox.request_id, inbox.next_seq, event))


def ended(text: str, *, index: int = 0, usage: Usage | None = None) -> list[Event]:
    ends: list[Event] = [Delta(text, index, 1, "stop")]
    return [*ends, Finished(usage)] if usage else ends


def test_choices_of_all_prompts_are_numbered_and_usage_is_summed() -> None:
    both = Jobs(2)
    both.feed(1, Started("w"), Echo("B"), *ended("b0"), *ended("b1", index=1, usage=Usage(2, 3, 1)))
    both.feed(0, Started("w"), Echo("A"), *ended("a1", index=1), *ended("a0", usage=Usage(10, 20, 4)))
    body = text_completion(JoinedReader(both.readers, 2), "id", "m", choices=4)
    assert [(each["index"], each["text"]) for each in body["choices"]] == [
        (0, "Aa0"),
        (1, "Aa1"),
        (2, "Bb0"),
        (3, "Bb1"),
    ]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (12, 23, 35)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


def read_in_a_thread(reader: JoinedReader) -> tuple[threading.Thread, list[Event]]:
    """Read until something arrives."""
    seen: list[Event] = []

    def read() -> None:
        while not seen:
            seen.extend(reader.next_events())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, seen


def test_the_events_of_any_prompt_wake_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt is silent; the second one's text arrives while the reader waits."""
    monkeypatch.setattr(joined_reader, "CHECK_S", 1000.0)
    both = Jobs(2)
    waiting = threading.Event()

    def look(own: EventReader, wait_s: float) -> list[Event]:
        if wait_s:
            waiting.set()
        return next_events(own, wait_s)

    monkeypatch.setattr(EventReader, "next_events", look)
    thread, seen = read_in_a_thread(JoinedReader(both.readers, 1))
    assert waiting.wait(30)
    both.feed(1, Delta("x"))
    thread.join(30)
    assert seen == [Delta("x", 1)]


def test_an_event_that_comes_between_two_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when its inbox has been looked at, and another one's is next."""
    monkeypatch.setattr(joined_reader, "CHECK_S", 1000.0)
    three = Jobs(3)

    def look(own: EventReader, wait_s: float) -> list[Event]:
        if own is three.readers[2] and not three.inboxes[1].next_seq:
            three.feed(1, Delta("x"))
        return next_events(own, wait_s)

    monkeypatch.setattr(EventReader, "next_events", look)
    thread, seen = read_in_a_thread(JoinedReader(three.readers, 1))
    thread.join(30)
    assert seen == [Delta("x", 1)]


def test_a_prompt_with_tokens_is_cut_at_the_deadline() -> None:
    both = Jobs(2)
    reader = JoinedReader(both.readers, 1)
    both.feed(0, *ended("x", usage=Usage(1, 1)))
    both.feed(1, Delta("y"))
    assert len(reader.next_events()) == 2
    both.readers[1]._ends_at = -10.0
    both.readers[1]._check_at = 0.0
    cut = Delta("", 1, 0, "length")
    assert reader.next_events() == [cut, Finished(Usage(1, 2))]


def test_a_failure_of_one_prompt_ends_all() -> None:
    three = Jobs(3)
    reader = JoinedReader(three.readers, 1)
    three.feed(0, *ended("done", usage=Usage(1, 1)))
    three.feed(2, Delta("x"))
    assert len(reader.next_events()) == 2
    three.feed(1, Failed.of(WorkerLost()))
    with pytest.raises(WorkerLost):
        text_completion(reader, "id", "m", choices=3)
    reader.close()
    # cancelled are those that are not finished, and they come first: the first one ends the timings
    assert three.closed == [("r-1", False), ("r-2", False), ("r-0", True)]


def test_a_stream_begins_when_the_first_job_has_checked_all_prompts() -> None:
    three = Jobs(3)
    reader = JoinedReader(three.readers, 2, first_checks=True)
    three.feed(2, Started("w"), *ended("c0"), *ended("c1", index=1, usage=Usage(1, 2)))
    three.feed(0, Started("w"))
    assert reader.next_events() == []
    three.feed(1, Started("w"), Delta("b0"))
    assert reader.next_events() == []
    three.feed(0, Delta("a1", 1))
    *others, last = [event for event in reader.next_events() if isinstance(event, Delta)]
    assert [(delta.index, delta.text) for delta in others] == [(4, "c0"), (5, "c1"), (2, "b0")]
    assert (last.index, last.text) == (1, "a1")
    three.feed(1, Delta("b0"))
    assert reader.next_events() == [Delta("b0", 2)]


def test_prompts_that_the_first_job_refuses_fail_the_request_before_its_first_event() -> None:
    both = Jobs(2)
    reader = JoinedReader(both.readers, 1, first_checks=True)
    both.feed(1, Started("w"), Delta("x"))
    assert reader.next_events() == []
    both.feed(0, Started("w"), Failed.of(InvalidRequest("the prompt is empty", param="prompt")))
    with pytest.raises(InvalidRequest):
        while not reader.next_events():
            pass


def test_only_the_first_job_of_a_stream_checks_the_other_prompts() -> None:
    assert [job.checked for job in jobs(prompt=["a", "b", "c"], stream=True)] == [["b", "c"], [], []]
    assert [job.checked for job in jobs(prompt=["a", "b", "c"])] == [[], [], []]
    assert jobs(prompt=[[1], [2]], stream=True)[0].checked == [[2]]


def test_a_prompt_without_a_token_at_the_deadline_fails_the_request() -> None:
    both = Jobs(2)
    reader = JoinedReader(both.readers, 1)
    both.feed(0, Delta("x"), *ended("", usage=Usage(1, 2)))
    both.feed(1, Started("w"))
    assert reader.next_events()
    both.readers[1]._ends_at = -10.0
    both.readers[1]._check_at = 0.0
    with pytest.raises(DeadlineExceeded):
        reader.next_events()


def frames(events: Iterable[list[Event]], *, n: int = 1, include_usage: bool = False) -> list[dict[str, Any]]:
    class Batches:
        finished = False

        def __init__(self) -> None:
            self._batches = list(events)

        def next_events(self) -> list[Event]:
            batch = self._batches.pop(0)
            self.finished = not self._batches
            return batch

    encoder = TextChunkEncoder("id", "m", n=n, include_usage=include_usage, timings=dict)
    stream = ChunkStream(Batches(), encoder)
    sent = b""
    while (part := stream.next_frames()) is not None:
        sent += part
    return [json.loads(line.removeprefix(b"data: ")) for line in sent.split(b"\n\n") if line]


def test_a_stream_has_the_prompt_then_its_logprobs_then_the_text() -> None:
    chunks = frames(
        [
            [Started("w")],
            [Echo("ab"), Echo("", logprobs=[token("a", None), token("b")])],
            [Delta("c", logprobs=[token("c")])],
            [Delta("", tokens=1, finish_reason="stop", stop_reason=7, logprobs=[token("<end>")])],
            [Finished(Usage(2, 2))],
        ]
    )
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["ab", "", "c", "", ""]
    offsets = [choice["logprobs"] and choice["logprobs"]["text_offset"] for choice in choices]
    assert offsets == [None, [0, 1], [2], [3], None]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", 7)
    assert chunks[-1]["usage"]["total_tokens"] == 4 and "usage" not in chunks[0]
