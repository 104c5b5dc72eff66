"""Divides an answer into content and calls, for formats that write arguments as JSON (call_format.py)."""

from enum import Enum, auto

from workers.engines.chat.answer.call_format import CallFormat, ObjectSyntax
from workers.engines.chat.answer.call_reader import CallReader, ReaderStatus
from workers.engines.chat.answer.pieces import Content, Piece
from workers.engines.chat.answer.thinking import overlap

MORE = -1
DIFFERENT = -2


def match(literal: str, text: str) -> int:
    """Return the place in `text` behind `literal`, where spaces don't count.

    MORE: the text so far agrees. DIFFERENT: it does not.
    """
    at = 0
    for character in literal:
        if character.isspace():
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return MORE
        if text[at] != character:
            return DIFFERENT
        at += 1
    return at


class _State(Enum):
    TEXT = auto()
    CALL = auto()
    AFTER = auto()
    """Behind a call."""


class CallDivider:
    """Implements Divider. What looks like a call and is none is content, from its first character on.

    Arguments are sent as they arrive. If they turn out to be no JSON, the text of the call follows as
    content, and the call doesn't count.
    """

    thinking = False

    def __init__(self, format: CallFormat, names: frozenset[str]) -> None:
        """`names`: those of the request's tools."""
        self._format = format
        self._names = names
        self._marker = format.marker
        self._state = _State.TEXT
        self._held = ""
        self._raw = ""
        """The text of the call that is being read, with its opening."""
        self._reader = CallReader(format, names, 0)
        self._number = 0
        self._may_start = True
        """For calls without a mark: there is no other text before."""
        self.calls: list[int] = []

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        steps = {_State.TEXT: self._in_text, _State.CALL: self._in_call, _State.AFTER: self._after}
        while self._held and steps[self._state](pieces):
            pass
        return pieces

    def finish(self, cut: bool) -> list[Piece]:
        rest, self._held = self._held, ""
        if self._state is _State.AFTER:
            return []  # a part of the closing
        if self._state is _State.CALL:
            self._reader.finish(cut)
            if self._reader.status is ReaderStatus.BROKEN:
                rest = self._raw
            elif self._reader.arguments_complete:
                self.calls.append(self._number)
        if cut and (self.calls or self._is_opened(rest)):
            return []  # the head of a call, perhaps a part of its mark: neither a call nor content
        return [Content(rest)] if rest else []

    def _is_opened(self, text: str) -> bool:
        return bool(self._marker) and text.startswith(self._marker)

    def _in_text(self, pieces: list[Piece]) -> bool:
        """Take a part of the held text. Returns whether there may be another one to take."""
        if not self._marker:
            return self._at_start(pieces)
        at = self._held.find(self._marker)
        if at < 0:
            at = len(self._held) - overlap(self._held, self._marker)
            self._send(self._held[:at], pieces)
            self._held = self._held[at:]
            return False
        self._send(self._held[:at], pieces)
        self._held = self._held[at:]
        end = match(self._format.opening, self._held)
        if end == DIFFERENT:
            self._send(self._marker, pieces)
            self._held = self._held[len(self._marker) :]
        elif end != MORE:
            self._begin(end)
        return end != MORE

    def _at_start(self, pieces: list[Piece]) -> bool:
        text = self._held.lstrip("; \t\r\n") if self.calls else self._held.lstrip()
        if self._may_start and not text:
            return False
        if self._may_start and text.startswith("{"):
            self._begin(len(self._held) - len(text))
            return True
        self._may_start = False
        self._send(self._held, pieces)
        self._held = ""
        return False

    def _begin(self, end: int) -> None:
        """Read a call behind the first `end` characters of the held text."""
        self._raw, self._held = self._held[:end], self._held[end:]
        self._reader = CallReader(self._format, self._names, self._number)
        self._state = _State.CALL

    def _in_call(self, pieces: list[Piece]) -> bool:
        text, self._held = self._held, ""
        self._raw += text
        pieces += self._reader.feed(text)
        if self._reader.status is ReaderStatus.DONE:
            self._held, self._state = self._reader.rest, _State.AFTER
            self.calls.append(self._number)
            self._number += 1
        elif self._reader.status is ReaderStatus.BROKEN:
            self._give_up(pieces)
        return True

    def _give_up(self, pieces: list[Piece]) -> None:
        """Send the beginning of what is no call as content. The rest may have another call."""
        self._number += self._reader.started
        self._may_start = False
        start = len(self._marker) if self._is_opened(self._raw) else 1
        self._send(self._raw[:start], pieces)
        self._held, self._state = self._raw[start:], _State.TEXT

    def _after(self, pieces: list[Piece]) -> bool:
        separator, closing = self._format.separator or "", self._format.closing
        next_call = match(separator, self._held) if separator.strip() else self._next_object()
        end = match(closing, self._held)
        if next_call >= 0:
            self._begin(next_call)
        elif end >= 0 and (next_call == DIFFERENT or match(closing, separator) >= 0):
            # the text behind may have a call with an opening of its own
            self._held, self._state = self._held[end:], _State.TEXT
        elif MORE in (next_call, end):
            return False
        else:
            self._state = _State.TEXT
        return True

    def _next_object(self) -> int:
        """Return what `match` does for a format in which spaces alone are between the objects of calls."""
        if self._format.separator is None or not isinstance(self._format.syntax, ObjectSyntax):
            return DIFFERENT
        text = self._held.lstrip()
        return MORE if not text else len(self._held) - len(text) if text[0] == "{" else DIFFERENT

    @staticmethod
    def _send(text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Content(text))
