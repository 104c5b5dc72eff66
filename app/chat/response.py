"""Turns the events of a chat completion into SSE chunks. Knows no socket and no Flask."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from app.dispatch.event_reader import CHECK_S, Reader
from app.http.json import encode_json
from app.http.sse import frame
from protocol.errors import DeadlineExceeded
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

_json = encode_json


def usage_body(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    body = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        body["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return body


def logprobs_body(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    """Return OpenAI's logprobs object of one choice or one chunk; None if they were not requested."""
    if logprobs is None:
        return None
    return {"content": [_token_body(token) for token in logprobs]}


def _token_body(token: TokenLogprob) -> dict[str, Any]:
    top = [{"token": each.token, "logprob": each.logprob, "bytes": each.bytes} for each in token.top]
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes, "top_logprobs": top}


def _call_part(event: ToolCallDelta) -> dict[str, Any]:
    """Return a part of a call: the first one has id, type and name."""
    function = {"arguments": event.arguments}
    if not event.id:
        return {"index": event.call, "function": function}
    named = {"name": event.name, **function}
    return {"index": event.call, "id": event.id, "type": "function", "function": named}


class RequestReader(Protocol):
    """The part that ChatEventReader needs: also whether an event is missing before some that have arrived."""

    finished: bool

    def next_events(self, wait_s: float = CHECK_S) -> list[Event]: ...

    @property
    def incomplete(self) -> bool: ...


ARRIVING_S = 5.0
"""A response whose last token is older than this at its deadline has been broken off, not ended by the
deadline."""


class ChatEventReader:
    """Reads the events of `n` choices, and ends them with finish_reason "length" at a deadline.

    A worker ends its requests at their deadline by itself; this covers a worker that is a little late. It
    does so only while tokens are arriving and none is missing: otherwise DeadlineExceeded is raised, since a
    response that was broken off must not look complete. Usage has the tokens received so far. Raises what
    `reader` raises.
    """

    __slots__ = ("_arrived_at", "_clock", "_open", "_reader", "_tokens", "finished")

    def __init__(self, reader: RequestReader, n: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader
        self._clock = clock
        self._arrived_at = 0.0
        self._open = set(range(n))
        self._tokens = 0
        self.finished = False

    def next_events(self, wait_s: float = CHECK_S) -> list[Event]:
        """Return the events since the last call; an empty list after `wait_s` of silence."""
        try:
            batch = self._reader.next_events(wait_s)
        except DeadlineExceeded:
            is_late = self._clock() - self._arrived_at > ARRIVING_S
            if not self._tokens or is_late or self._reader.incomplete:
                raise
            self.finished = True
            ends: list[Event] = [Delta("", index, 0, "length") for index in sorted(self._open)]
            return [*ends, Finished(Usage(0, self._tokens))]
        self.finished = self._reader.finished
        for event in batch:
            if isinstance(event, Delta | ReasoningDelta | ToolCallDelta):
                self._tokens += event.tokens
                self._arrived_at = self._clock()
                if isinstance(event, Delta) and event.finish_reason:
                    self._open.discard(event.index)
        return batch


class ChunkEncoder:
    """Encodes events as SSE frames. What all chunks of a response have in common is encoded once."""

    object = "chat.completion.chunk"

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        n: int,
        include_usage: bool,
        timings: Callable[[], dict[str, int]],
        created: int | None = None,
    ) -> None:
        """`timings`: those of the response if it ended now (app.dispatch.timings.Timings.milliseconds).

        `created`: Unix time in seconds, by default now.
        """
        self._n = n
        self._include_usage = include_usage
        self._timings = timings
        self.created = int(time.time()) if created is None else created
        head = {
            "id": request_id,
            "object": self.object,
            "created": self.created,
            "model": model,
        }
        self._head = _json(head)[:-1] + b',"choices":['
        # with include_usage OpenAI's chunks have the field too, as null; one last chunk has the figures
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self._before_text = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(n)]
        self._held: list[bytes] = []

    def opening(self) -> bytes:
        """Return the first chunk of each choice, which has the role."""
        chunk = b'{"index":%d,"delta":{"role":"assistant"},"logprobs":null,"finish_reason":null}'
        return b"".join(frame(self._head + chunk % index + self._tail) for index in range(self._n))

    def frames(self, batch: list[Event]) -> bytes:
        """Return the frames of a batch; b"" if none of its events is visible to the client."""
        return b"".join(part for event in batch for part in self._event(event))

    def _event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Delta):
            if event.text or event.logprobs:
                yield self._text(event)
            if event.finish_reason:
                # the last finish chunk has usage, which comes with Finished: each is held until the next
                yield from (frame(chunk + self._tail) for chunk in self._held)
                self._held = [self._finish(event)]
        elif isinstance(event, ReasoningDelta):
            yield self._delta(event, b'{"reasoning_content":%s}' % _json(event.text))
        elif isinstance(event, ToolCallDelta):
            yield self._delta(event, b'{"tool_calls":[%s]}' % _json(_call_part(event)))
        elif isinstance(event, Finished):
            usage = _json(usage_body(event.usage or Usage(0, 0)))
            tail = b'],"usage":' + usage + b',"timings":' + _json(self._timings()) + b"}"
            for chunk in self._held:
                yield frame(chunk + (self._tail if self._include_usage else tail))
            if self._include_usage:
                yield frame(self._head + tail)

    def _text(self, delta: Delta) -> bytes:
        logprobs = b"null" if delta.logprobs is None else _json(logprobs_body(delta.logprobs))
        head = self._before_text[delta.index]
        choice = _json(delta.text) + b'},"logprobs":' + logprobs + b',"finish_reason":null}'
        return frame(head + choice + self._tail)

    def _delta(self, event: ReasoningDelta | ToolCallDelta, delta: bytes) -> bytes:
        """Frame a chunk that has no content. `delta`: its delta as JSON."""
        logprobs = b"null" if event.logprobs is None else _json(logprobs_body(event.logprobs))
        choice = b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null}'
        return frame(self._head + choice % (event.index, delta, logprobs) + self._tail)

    def _finish(self, delta: Delta) -> bytes:
        choice = {
            "index": delta.index,
            "delta": {"content": ""},
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return self._head + _json(choice)


class ChunkStream:
    """Frames of a chat completion for app.http.sse.EventStream.

    The constructor waits for the first token: until then nothing is sent, so that an error has an HTTP status
    of its own. Raises what `reader` raises.
    """

    __slots__ = ("_encoder", "_lead", "_reader")

    def __init__(self, reader: Reader, encoder: ChunkEncoder) -> None:
        self._reader = reader
        self._encoder = encoder
        batch: list[Event] = []
        while all(isinstance(event, Started) for event in batch):
            batch = reader.next_events()
        self._lead = encoder.opening() + encoder.frames(batch)

    def next_frames(self) -> bytes | None:
        """Return the frames of the next batch; b"" if nothing in it is visible, None after the last."""
        if self._lead:
            lead, self._lead = self._lead, b""
            return lead
        return None if self._reader.finished else self._encoder.frames(self._reader.next_events())
