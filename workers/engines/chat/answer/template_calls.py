"""Divides an answer by a response template of transformers: channels, and calls that are not written as
JSON."""

import re
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from protocol.jobs import FUNCTION_NAME
from workers.engines.chat.answer.call_reader import new_id
from workers.engines.chat.answer.json_text import parse_object, write_json
from workers.engines.chat.answer.pieces import CallArguments, CallStart, Content, Piece, Reasoning

_NAME = re.compile(FUNCTION_NAME)
_MARK = re.compile(r"\s*(?:<[^<>\s]+>|to=functions\.)")
"""What the head of a call begins with."""
_NO_TEXT = "\0"
"""Occurs in no delimiter."""

UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""What ResponseParser raises for a call that it can't read, or can't convert to the types of its tool."""

CALLS = "tool_calls"
REASONING = frozenset({"thinking", "reasoning", "reasoning_content"})


class TemplateDivider:
    """Implements Divider. A call is sent when it is complete; one that can't be read is content."""

    def __init__(self, template: dict[str, Any], prompt: str, tools: list[dict[str, Any]]) -> None:
        """`prompt`: the template begins to read behind its last `start_anchor`."""
        self._template = template
        self._tools = tools
        self._parser = self._begin(prompt)
        self._field: str | None = None
        """The region that is open."""
        self._unsent = ""
        """The text since the last piece, which is content if it can't be read."""
        self._body = ""
        """The text of the call that is open."""
        self._spaces = ""
        """At the end of the reasoning so far; left out if nothing follows."""
        self._begun = False
        """Whether the open region of reasoning has text."""
        self._reasoned = False
        """Whether any has."""
        self.calls: list[int] = []
        for event in self._parser.initial_events:
            self._track(event)

    def _begin(self, prompt: str) -> ResponseParser:
        try:
            return ResponseParser(self._template, prefix=prompt, tools=self._tools)
        except UNREADABLE:  # the message to be continued has a call that can't be read
            return ResponseParser(self._template, prefix="", tools=self._tools)

    @property
    def thinking(self) -> bool:
        return self._field in REASONING

    def feed(self, text: str) -> list[Piece]:
        self._unsent += text
        try:
            events = self._parser.feed(text)
        except UNREADABLE:
            return self._give_up()
        return self._pieces(events)

    def finish(self, cut: bool) -> list[Piece]:
        if cut:
            return self._cut_call() if self._field == CALLS else self._cut_text()
        return self._end()

    def _cut_call(self) -> list[Piece]:
        """Return the call that is open if its text is complete."""
        # the parser waits for a character behind the closing, which might go on
        pieces = self.feed(_NO_TEXT)
        return [piece for piece in pieces if isinstance(piece, CallStart | CallArguments)]

    def _cut_text(self) -> list[Piece]:
        """Return what was held back, without what the next call begins with."""
        made = len(self.calls)
        pieces = self._end()
        # a call that begins with the last of the text has lost its arguments
        del self.calls[made:]
        return [
            piece
            for piece in pieces
            if isinstance(piece, Reasoning)
            or (isinstance(piece, Content) and not made and not _MARK.match(piece.text))
        ]

    def _end(self) -> list[Piece]:
        try:
            _, events = self._parser.finalize()
        except UNREADABLE:
            return self._give_up()
        return self._pieces(events)

    def _give_up(self) -> list[Piece]:
        text, self._unsent, self._field = self._unsent, "", None
        self._parser = self._begin("")
        return [Content(text)] if text else []

    def _pieces(self, events: list[dict[str, Any]]) -> list[Piece]:
        return [piece for event in events for piece in self._track(event)]

    def _track(self, event: dict[str, Any]) -> list[Piece]:
        field, kind = event["field"], event["type"]
        self._field = None if kind == "region_close" else field
        if kind == "region_open":
            self._body, self._spaces, self._begun = "", "", False
        elif field == CALLS:
            if kind == "region_close":
                return self._calls(event["value"])
            self._body += event["text"]
        elif kind == "region_chunk":
            self._sent(event["text"])
            return self._reasoning(event["text"]) if field in REASONING else [Content(event["text"])]
        return []

    def _sent(self, text: str) -> str:
        """Take `text`, and what is before it, from the unsent text."""
        end = self._unsent.find(text) + len(text)
        raw, self._unsent = self._unsent[:end], self._unsent[end:]
        return raw

    def _reasoning(self, text: str) -> list[Piece]:
        """Return a part of the reasoning without spaces at its ends."""
        text = self._spaces + text if self._begun else text.lstrip()
        ready = text.rstrip()
        self._spaces = text[len(ready) :]
        if not ready:
            return []
        # several regions, as channels have them, are lines of one reasoning
        joint = "\n" if self._reasoned and not self._begun else ""
        self._begun = self._reasoned = True
        return [Reasoning(joint + ready)]

    def _calls(self, value: Any) -> list[Piece]:
        raw = self._sent(self._body)
        pieces: list[Piece] = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            name, arguments = function.get("name"), function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = parse_object(arguments)
            if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(arguments, dict)):
                return [Content(raw)]
            number = len(self.calls) + len(pieces) // 2
            pieces.append(CallStart(number, new_id(), name))
            pieces.append(CallArguments(number, write_json(arguments)))
        self.calls += [piece.number for piece in pieces if isinstance(piece, CallStart)]
        return pieces
