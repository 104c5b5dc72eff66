"""Turns the events of a completion into one JSON document, or into SSE chunks.

Knows no socket and no Flask.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from app.chat.response import ChunkEncoder, usage_body
from app.chat.text_logprobs import TextLogprobs
from app.dispatch.event_reader import Reader
from app.http.json import encode_json
from app.http.sse import frame
from protocol.events import Delta, Echo, Event, Finished, TokenLogprob, Usage

OBJECT = "text_completion"


def text_completion(reader: Reader, request_id: str, model: str, *, choices: int) -> dict[str, Any]:
    """Read all events and return the body of a response that is not streamed. Raises what `reader` raises."""
    made = [_Choice() for _ in range(choices)]
    usage = Usage(0, 0)
    while not reader.finished:
        for event in reader.next_events():
            if isinstance(event, Echo | Delta):
                made[event.index].add(event)
            elif isinstance(event, Finished):
                usage = event.usage or usage
    bodies = []
    for index, choice in enumerate(made):
        bodies.append(choice.body(index))
        # lets other requests go on: those of long prompts take milliseconds each
        time.sleep(0)
    return {
        "code": 0,
        "message": "success",
        "id": request_id,
        "object": OBJECT,
        "created": int(time.time()),
        "model": model,
        "choices": bodies,
        "usage": usage_body(usage),
    }


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    texts: list[str] = field(default_factory=list)
    of_prompt: list[TokenLogprob] | None = None
    of_answer: list[TokenLogprob] | None = None
    logprobs: TextLogprobs = field(default_factory=TextLogprobs)
    finish_reason: str = "length"
    stop_reason: int | str | None = None

    def add(self, event: Echo | Delta) -> None:
        self.texts.append(event.text)
        if isinstance(event, Echo):
            if event.text:
                self.logprobs.begin(event.text)
            if event.logprobs is not None:
                self.of_prompt = [*(self.of_prompt or []), *event.logprobs]
            return
        if event.finish_reason:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        if event.logprobs is not None:
            self.of_answer = [*(self.of_answer or []), *event.logprobs]

    def body(self, index: int) -> dict[str, Any]:
        logprobs = None
        if self.of_prompt is not None or self.of_answer is not None:
            before = self.logprobs.of_prompt(self.of_prompt or [])
            after = self.logprobs.of_answer(self.of_answer or [])
            logprobs = {name: before[name] + after[name] for name in before}
        return {
            "index": index,
            "text": "".join(self.texts),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


class TextChunkEncoder(ChunkEncoder):
    """Encodes the events of a completion as SSE frames."""

    object = OBJECT

    def __init__(self, *arguments: Any, n: int, **options: Any) -> None:
        super().__init__(*arguments, n=n, **options)
        self._logprobs = [TextLogprobs() for _ in range(n)]

    def opening(self) -> bytes:
        """Return nothing: there are no roles."""
        return b""

    def _event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Echo):
            logprobs = self._logprobs[event.index]
            if event.text:
                logprobs.begin(event.text)
            of_prompt = None if event.logprobs is None else logprobs.of_prompt(event.logprobs)
            yield self._choice(event.index, event.text, of_prompt)
        else:
            yield from super()._event(event)

    def _text(self, delta: Delta) -> bytes:
        logprobs = self._logprobs[delta.index]
        own = None if delta.logprobs is None else logprobs.of_answer(delta.logprobs)
        return self._choice(delta.index, delta.text, own)

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return frame(self._head + encode_json(choice) + self._tail)

    def _finish(self, delta: Delta) -> bytes:
        choice = {
            "index": delta.index,
            "text": "",
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return self._head + encode_json(choice)
