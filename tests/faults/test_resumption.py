"""Streams that are continued after their connection was cut, by two web processes of one deployment."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Stream, free_port, wait_until
from tests.faults.conftest import counted
from tests.faults.test_clients import chat_body
from tests.security.conftest import KeyedDeployment

KEYS = {"first": {"Authorization": "Bearer key-1"}, "other": {"Authorization": "Bearer key-2"}}
SHORT_GRACE_S = 2


class Event(NamedTuple):
    """One event of a stream. `data`: the chunk without its timings, which differ, or [DONE]."""

    id: str | None
    data: Any


class Events:
    """Reads the events of a stream with their ids."""

    def __init__(self, stream: Stream) -> None:
        assert stream.status == 200, stream.response.read()
        self.stream = stream
        self.found: list[Event] = []

    def read(self, count: int | None = None) -> list[Event]:
        """Read `count` more events, or all; return all so far. Closes nothing."""
        number: str | None = None
        more = 0
        while more != count and (line := self.stream.response.readline()):
            if line.startswith(b"id: "):
                number = line[4:].strip().decode()
            elif line.startswith(b"data: "):
                data = line[6:].strip()
                chunk = data.decode() if data == b"[DONE]" else json.loads(data)
                if isinstance(chunk, dict) and "error" not in chunk:
                    assert ("timings" in chunk) == (chunk.get("usage") is not None)
                    chunk.pop("timings", None)
                self.found.append(Event(number, chunk))
                number, more = None, more + 1
        return self.found

    @property
    def id(self) -> str:
        """The id of the request."""
        return str(self.found[0].data["id"])

    def cut(self) -> str:
        """Close the connection; return the number of the last chunk that was read."""
        self.stream.close()
        return self.found[-1].id or ""


class Pair(NamedTuple):
    """Two web processes and their worker with two slots. Streams of `impatient` have SHORT_GRACE_S."""

    patient: Deployment
    impatient: Deployment
    opened: ExitStack
    node_address: tuple[str, int]

    def begin(self, tokens: int, web: Deployment | None = None, wanted: str = "true") -> Events:
        """Begin a stream that can be resumed."""
        body = chat_body(tokens, stream=True, stream_options={"include_usage": True})
        sent = {"Content-Type": "application/json", "X-Resumable": wanted}
        response, connection = (web or self.patient).request("POST", "/v1/chat/completions", body, sent)
        return Events(self._opened(Stream(response, connection)))

    def resume(
        self, web: Deployment, request_id: str, after: str | None = None, key: str = "first"
    ) -> Stream:
        """Ask for the events of a stream."""
        headers = dict(KEYS[key])
        if after is not None:
            headers["Last-Event-ID"] = after
        response, connection = web.request(
            "GET", f"/v1/chat/completions/{request_id}/events", headers=headers
        )
        return self._opened(Stream(response, connection))

    def refusal(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        """Ask for the events of a stream, which is refused: the status and the code."""
        stream = self.resume(*arguments, **options)
        return stream.status, json.loads(stream.response.read())["error"]["code"]

    def _opened(self, stream: Stream) -> Stream:
        self.opened.callback(stream.close)
        return stream


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Tests leave it idle, and with both web processes running."""
    folder: Path = tmp_path_factory.mktemp("resumption")
    catalogue = ECHO_CATALOGUE.format(step_ms=20, slots=2)
    with ExitStack() as stack:
        webs: list[KeyedDeployment] = []
        node_port = free_port()
        for name, grace_s in (("patient", 30), ("impatient", SHORT_GRACE_S)):
            web = KeyedDeployment(
                folder / name,
                catalogue=catalogue,
                redis_server=webs[0].redis if webs else None,
                API_KEYS="key-1,key-2",
                NODE_BIND=f"127.0.0.1:{free_port() if webs else node_port}",
                STREAM_GRACE_S=str(grace_s),
            )
            web.key = "key-1"
            webs.append(stack.enter_context(web))
        webs[0].start("echo")
        webs[1].start_web()
        webs[1].wait_ready("echo")
        yield Pair(webs[0], webs[1], stack, ("127.0.0.1", node_port))


def joined(first: list[Event], rest: list[Event]) -> list[Event]:
    """All events, of which those of a resumed stream have ids without a gap."""
    events = [*first, *rest]
    assert [event.id for event in events[:-1]] == [str(1 + place) for place in range(len(events) - 1)]
    assert events[-1] == (None, "[DONE]")
    return events


def text_of(events: list[Event]) -> str:
    choices = [event.data["choices"] for event in events[:-1]]
    return "".join(choice["delta"].get("content", "") for (choice,) in filter(None, choices))


def without_request(events: list[Event]) -> list[Any]:
    """The data of events without what differs from request to request."""
    return [
        {name: value for name, value in event.data.items() if name not in ("id", "created")}
        for event in events[:-1]
    ]


@pytest.mark.parametrize("web", ["same", "other"])
def test_a_cut_stream_is_continued_while_it_runs(pair: Pair, web: str) -> None:
    whole = pair.begin(100).read()
    events = pair.begin(100)
    first = events.read(30)
    after = events.cut()
    assert after == "30"
    rest = Events(pair.resume(pair.patient if web == "same" else pair.impatient, events.id, after)).read()
    found = joined(first, rest)
    assert without_request(found) == without_request(whole)
    assert {event.data["id"] for event in found[:-1]} == {events.id}
    assert len({event.data["created"] for event in found[:-1]}) == 1
    assert text_of(found) == counted(100)
    assert found[-2].data["usage"]["completion_tokens"] == 100


def test_a_stream_that_was_cut_again_and_again(pair: Pair) -> None:
    events = pair.begin(120)
    found = events.read(5)[:]
    for web in (pair.impatient, pair.patient, pair.impatient):
        events.cut()
        events = Events(pair.resume(web, found[0].data["id"], found[-1].id))
        found += events.read(20)
    found = joined(found, events.read()[20:])
    assert text_of(found) == counted(120)


def test_a_finished_stream_is_replayed_from_any_event(pair: Pair) -> None:
    events = pair.begin(10)
    whole = events.read()
    for after in range(len(whole)):
        web = (pair.patient, pair.impatient)[after % 2]
        assert Events(pair.resume(web, events.id, str(after))).read() == whole[after:]
    # a client that has read nothing sends no id
    assert Events(pair.resume(pair.patient, events.id)).read() == whole


def test_the_web_process_is_killed(pair: Pair) -> None:
    events = pair.begin(100)
    first = events.read(20)
    web = pair.patient.web
    assert web is not None
    os.killpg(web.pid, signal.SIGKILL)
    web.popen.wait(20)
    first = events.read()
    rest = Events(pair.resume(pair.impatient, events.id, first[-1].id)).read()
    assert text_of(joined(first, rest)) == counted(100)
    pair.patient.start_web()
    pair.patient.wait_ready("echo")


def test_nobody_comes_back_to_a_killed_web_process(pair: Pair) -> None:
    events = pair.begin(100_000)
    events.read(20)
    web = pair.patient.web
    assert web is not None
    # its streams have a short grace period from when the worker takes it for lost
    pair.patient.redis.client.hset(f"Test:stream:{events.id}", "grace_s", "1")
    os.killpg(web.pid, signal.SIGKILL)
    web.popen.wait(20)
    wait_until(lambda: pair.patient.running_tasks() == 0, timeout_s=60, what="the generation is cancelled")
    assert pair.refusal(pair.impatient, events.id) == (404, "not_found")
    pair.patient.start_web()
    pair.patient.wait_ready("echo")


def test_nobody_comes_back_within_the_grace_period(pair: Pair) -> None:
    events = pair.begin(100_000, pair.impatient)
    events.read(10)
    events.cut()
    cut_at = time.monotonic()
    wait_until(lambda: pair.patient.running_tasks() == 0, timeout_s=30, what="the generation is cancelled")
    assert time.monotonic() - cut_at > SHORT_GRACE_S, "it was cancelled too soon"
    assert pair.refusal(pair.impatient, events.id, "10") == (404, "not_found")
    # both slots are free
    streams = [pair.begin(5), pair.begin(5)]
    assert [text_of(stream.read()) for stream in streams] == [counted(5)] * 2
    (line,) = [
        line
        for line in pair.patient.workers["echo-1"].log.read_text().splitlines()
        if events.id in line and " outcome=" in line
    ]
    assert "outcome=cancelled" in line


def test_a_stream_whose_client_came_back_goes_on(pair: Pair) -> None:
    events = pair.begin(200, pair.impatient)
    first = events.read(10)
    after = events.cut()
    again = Events(pair.resume(pair.patient, events.id, after))
    rest = again.read()
    assert text_of(joined(first, rest)) == counted(200), "longer than the grace period"


def test_the_newer_of_two_readers_wins(pair: Pair) -> None:
    for web in (pair.patient, pair.impatient):
        events = pair.begin(100)
        first = events.read(10)[:]
        rest = Events(pair.resume(web, events.id, "10")).read()
        assert text_of(joined(first, rest)) == counted(100)
        last = events.read()[-1]
        assert last.data["error"]["code"] == "taken_over"
        assert last.data["code"] == 409


def test_who_may_resume(pair: Pair) -> None:
    events = pair.begin(5)
    whole = events.read()
    assert pair.refusal(pair.patient, events.id, key="other") == (404, "not_found")
    assert pair.refusal(pair.patient, "cmpl-unknown") == (404, "not_found")
    for wrong in ("x", "-1", "1.5", f"{events.id}:1", "9" * 30):
        assert pair.refusal(pair.patient, events.id, wrong) == (400, "invalid_request")
    assert Events(pair.resume(pair.patient, events.id)).read() == whole


def test_streams_that_did_not_ask_have_no_ids(pair: Pair) -> None:
    for wanted in ("false", ""):
        events = pair.begin(5, wanted=wanted)
        assert {event.id for event in events.read()} == {None}
        assert pair.refusal(pair.patient, events.id) == (404, "not_found")
    keys = f"Test:events:{events.id}"
    wait_until(lambda: not pair.patient.redis.client.keys(keys), timeout_s=30, what="its events are deleted")


def test_the_listener_of_the_node_serves_no_streams_that_can_be_resumed(pair: Pair) -> None:
    body = chat_body(2, stream=True)
    headers = {"Content-Type": "application/json", "X-Resumable": "true"}
    with closing(HTTPConnection(*pair.node_address, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse().read()
    assert answer.endswith(b"data: [DONE]\n\n") and b"id: " not in answer
