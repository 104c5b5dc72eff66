"""Turns the events of a chat completion into one JSON document. Knows no socket and no Flask."""

import time
from dataclasses import dataclass, field
from typing import Any

from app.chat.response import Reader, logprobs_body, usage_body
from protocol.events import Delta, Finished, ReasoningDelta, TokenLogprob, Usage


def completion(reader: Reader, request_id: str, model: str, *, n: int) -> dict[str, Any]:
    """Read all events and return the body of a response that is not streamed. Raises what `reader` raises."""
    choices = [_Choice() for _ in range(n)]
    usage = Usage(0, 0)
    while not reader.finished:
        for event in reader.next_events():
            if isinstance(event, Delta | ReasoningDelta):
                choices[event.index].add(event)
            elif isinstance(event, Finished):
                usage = event.usage or usage
    return {
        "code": 0,
        "message": "success",
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice.body(index) for index, choice in enumerate(choices)],
        "usage": usage_body(usage),
    }


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str = "length"
    stop_reason: int | str | None = None

    def add(self, event: Delta | ReasoningDelta) -> None:
        if isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
        else:
            self.texts.append(event.text)
            if event.finish_reason:
                self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        if event.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *event.logprobs]

    def body(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.texts)}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs_body(self.logprobs),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
