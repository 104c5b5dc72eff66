"""Turns the events of a chat completion into one JSON document. Knows no socket and no Flask."""

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from app.chat.response import logprobs_body, usage_body
from app.dispatch.event_reader import Reader
from protocol.events import Delta, Finished, ReasoningDelta, TokenLogprob, ToolCallDelta, Usage


def completion(reader: Reader, request_id: str, model: str, *, n: int) -> dict[str, Any]:
    """Read all events and return the body of a response that is not streamed. Raises what `reader` raises."""
    choices = [_Choice() for _ in range(n)]
    usage = Usage(0, 0)
    while not reader.finished:
        for event in reader.next_events():
            if isinstance(event, Delta | ReasoningDelta | ToolCallDelta):
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
    calls: dict[int, "_Call"] = field(default_factory=dict)
    last_call: "_Call | None" = None
    """The call that no content has followed. One that is no JSON is followed by its text."""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str = "length"
    stop_reason: int | str | None = None

    def add(self, event: Delta | ReasoningDelta | ToolCallDelta) -> None:
        if isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            self.last_call = self.calls.setdefault(event.call, _Call(event.id, event.name))
            self.last_call.arguments.append(event.arguments)
        else:
            self.texts.append(event.text)
            if event.text:
                self.last_call = None
            if event.finish_reason:
                self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        if event.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *event.logprobs]

    def body(self, index: int) -> dict[str, Any]:
        # a call that max_tokens cut stays as it is
        cut = self.last_call if self.finish_reason == "length" else None
        calls = [call.body() for call in self.calls.values() if call is cut or call.is_json]
        text = "".join(self.texts)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs_body(self.logprobs),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }


@dataclass(slots=True, eq=False)
class _Call:
    """One call of a tool."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    @property
    def is_json(self) -> bool:
        """Whether the call is valid. The text of others is in the content."""
        try:
            return isinstance(msgspec.json.decode("".join(self.arguments)), dict)
        except (msgspec.DecodeError, RecursionError):
            return False

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}
