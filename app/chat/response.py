"""Events of a chat as the standard's answers: one JSON document, or chunks. Encodes last; knows no socket and no Flask."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from app.http.sse import frame
from protocol.errors import DeadlineExceeded
from protocol.events import Delta, Event, Finished, Started, TokenLogprob, Usage

_json = msgspec.json.encode


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def logprobs_body(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    """OpenAI's logprobs object of one choice or one chunk."""
    if logprobs is None:
        return None
    return {"content": [_token_body(token) for token in logprobs]}


def _token_body(token: TokenLogprob) -> dict[str, Any]:
    top = [{"token": each.token, "logprob": each.logprob, "bytes": each.bytes} for each in token.top]
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes, "top_logprobs": top}


class Batches(Protocol):
    """app.dispatch.dispatcher.EventReader, as far as a chat needs it."""

    over: bool

    def take(self) -> list[Event]: ...


class ChatAnswer:
    """An answer of `n` choices that ends properly at its deadline, also where the worker missed it: with
    finish_reason "length" and usage, where it has a token at all. Otherwise as app.dispatch.dispatcher.EventReader."""

    __slots__ = ("_batches", "_open", "_tokens", "over")

    def __init__(self, batches: Batches, n: int) -> None:
        self._batches = batches
        self._open = set(range(n))
        self._tokens = 0
        self.over = False

    def take(self) -> list[Event]:
        try:
            batch = self._batches.take()
        except DeadlineExceeded:
            if not self._tokens:
                raise
            self.over = True
            ends: list[Event] = [Delta("", index, 0, "length") for index in sorted(self._open)]
            return [*ends, Finished(Usage(0, self._tokens))]
        self.over = self._batches.over
        for event in batch:
            if isinstance(event, Delta):
                self._tokens += event.tokens
                if event.finish_reason:
                    self._open.discard(event.index)
        return batch


class ChunkEncoder:
    """Events to SSE frames. The parts that are the same in all chunks are encoded once, not for each token."""

    def __init__(self, request_id: str, model: str, *, n: int, include_usage: bool) -> None:
        self._n = n
        self._include_usage = include_usage
        head = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._head = _json(head)[:-1] + b',"choices":['
        self._before_text = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(n)]
        self._held: list[bytes] = []

    def opening(self) -> bytes:
        """The chunks that tell the role, one for each choice."""
        chunk = b'{"index":%d,"delta":{"role":"assistant"},"logprobs":null,"finish_reason":null}]}'
        return b"".join(frame(self._head + chunk % index) for index in range(self._n))

    def frames(self, batch: list[Event]) -> bytes:
        """All of a batch as frames; b"" when nothing in it shows."""
        return b"".join(part for event in batch for part in self._event(event))

    def _event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Delta):
            if event.text or event.logprobs:
                yield self._text(event)
            if event.finish_reason:
                # the last finish chunk carries usage, which comes with Finished: hold each until the next is known
                yield from (frame(chunk + b"]}") for chunk in self._held)
                self._held = [self._finish(event)]
        elif isinstance(event, Finished):
            usage = _json(usage_body(event.usage or Usage(0, 0)))
            for chunk in self._held:
                yield frame(chunk + (b"]}" if self._include_usage else b'],"usage":' + usage + b"}"))
            if self._include_usage:
                yield frame(self._head + b'],"usage":' + usage + b"}")

    def _text(self, delta: Delta) -> bytes:
        logprobs = b"null" if delta.logprobs is None else _json(logprobs_body(delta.logprobs))
        head = self._before_text[delta.index]
        return frame(head + _json(delta.text) + b'},"logprobs":' + logprobs + b',"finish_reason":null}]}')

    def _finish(self, delta: Delta) -> bytes:
        choice = {
            "index": delta.index,
            "delta": {"content": ""},
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return self._head + _json(choice)


class ChunkStream:
    """A chat as frames for app.http.sse.EventStream. Made when the answer's first token is there: until then nothing is sent,
    so that an error keeps its status. Raises what `answer` raises."""

    __slots__ = ("_answer", "_encoder", "_lead")

    def __init__(self, answer: Batches, encoder: ChunkEncoder) -> None:
        self._answer = answer
        self._encoder = encoder
        batch: list[Event] = []
        while all(isinstance(event, Started) for event in batch):
            batch = answer.take()
        self._lead = encoder.opening() + encoder.frames(batch)

    def take(self) -> bytes | None:
        """What has come as frames, b"" where nothing shows, None after all."""
        if self._lead:
            lead, self._lead = self._lead, b""
            return lead
        return None if self._answer.over else self._encoder.frames(self._answer.take())


def completion(answer: Batches, request_id: str, model: str, *, n: int) -> dict[str, Any]:
    """The plain answer: the deltas joined. Raises what `answer` raises."""
    texts: list[list[str]] = [[] for _ in range(n)]
    logprobs: list[list[TokenLogprob] | None] = [None] * n
    ends: list[Delta | None] = [None] * n
    usage = Usage(0, 0)
    while not answer.over:
        for event in answer.take():
            if isinstance(event, Delta):
                texts[event.index].append(event.text)
                if event.logprobs is not None:
                    logprobs[event.index] = [*(logprobs[event.index] or []), *event.logprobs]
                if event.finish_reason:
                    ends[event.index] = event
            elif isinstance(event, Finished):
                usage = event.usage or usage
    choices = [_choice(index, "".join(texts[index]), logprobs[index], ends[index]) for index in range(n)]
    return {
        "code": 0,
        "message": "success",
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage_body(usage),
    }


def _choice(index: int, text: str, logprobs: list[TokenLogprob] | None, end: Delta | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs_body(logprobs),
        "finish_reason": end.finish_reason if end else "length",
        "stop_reason": end.stop_reason if end else None,
    }
