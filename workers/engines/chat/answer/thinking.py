"""Finds the tags around a model's reasoning in its chat template, and divides an answer at them."""

import re
from enum import Enum, auto
from typing import NamedTuple

from workers.engines.chat.answer.pieces import Content, Piece, Reasoning
from workers.engines.chat.answer.probe import TemplateProbe

_TAG = r"(?:</?[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\])"
_TAG_BEFORE = re.compile(rf"({_TAG})\s*$")
_TAG_AFTER = re.compile(rf"\s*({_TAG})")

KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Of templates that name the tags without writing the reasoning of a message, as those that cut it off do."""


class ThinkTags(NamedTuple):
    """The texts before and after the reasoning."""

    open: str
    close: str

    @classmethod
    def of(cls, probe: TemplateProbe) -> "ThinkTags | None":
        """Find the tags of a template. Returns None for a model that doesn't reason."""
        return _written(probe) or _named(probe)

    def is_open(self, text: str) -> bool:
        """Whether a prompt ends with the opening tag, as some templates write it for the model."""
        # no more of it: a prompt can have megabytes
        return text[-1000:].rstrip().endswith(self.open)

    def is_open_in(self, message: str) -> bool:
        """Whether a message that the model goes on with ends inside its reasoning."""
        return message.rfind(self.open) > message.rfind(self.close)


def _written(probe: TemplateProbe) -> ThinkTags | None:
    """The tags that the template writes around the reasoning of a message."""
    reasoning, content = "sentinel of reasoning", "sentinel of content"
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    text = probe.conversation(message | {"reasoning": reasoning, "thinking": reasoning})
    before, found, after = (text or "").partition(reasoning)
    opening, closing = _TAG_BEFORE.search(before), _TAG_AFTER.match(after)
    if not found or content not in after or opening is None or closing is None:
        return None
    tags = ThinkTags(opening[1], closing[1])
    # tags of other names are those of a format with more parts than these two
    return tags if _word(tags.open) == _word(tags.close) else None


def _word(tag: str) -> str:
    return "".join(filter(str.isalpha, tag))


def _named(probe: TemplateProbe) -> ThinkTags | None:
    return next((ThinkTags(*tags) for tags in KNOWN_TAGS if tags[1] in probe.source), None)


class _State(Enum):
    START = auto()
    """Nothing but spaces, or a part of the opening tag."""
    OPENED = auto()
    """After the opening tag, or after one that the prompt ends with and the model may repeat."""
    THINKING = auto()
    CLOSED = auto()
    """Spaces after the closing tag, which belong to nothing."""
    ANSWER = auto()


class ThinkDivider:
    """Divides an answer into reasoning and content. Implements Divider.

    Spaces at the ends of the reasoning and before the content after it are left out.
    """

    def __init__(self, tags: ThinkTags, *, opened: bool, started: bool = False) -> None:
        """`opened`: the prompt ends inside the reasoning.

        `started`: or behind the beginning of the content.
        """
        self._tags = tags
        self._state = _State.OPENED if opened else _State.ANSWER if started else _State.START
        self._held = ""
        self.calls: list[int] = []

    @property
    def thinking(self) -> bool:
        return self._state in (_State.OPENED, _State.THINKING)

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._step(pieces):
            pass
        return pieces

    def finish(self, cut: bool) -> list[Piece]:
        rest, self._held = self._held, ""
        if self.thinking:
            rest = rest.rstrip()
            return [Reasoning(rest)] if rest else []
        return [Content(rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Take one part of the held text. Returns whether the next part can be taken."""
        if self._state in (_State.START, _State.OPENED):
            return self._open()
        if self._state is _State.THINKING:
            return self._think(pieces)
        if self._state is _State.CLOSED:
            self._held = self._held.lstrip()
            if not self._held:
                return False
            self._state = _State.ANSWER
        pieces.append(Content(self._held))
        self._held = ""
        return False

    def _open(self) -> bool:
        text = self._held.lstrip()
        opening = self._tags.open
        if text.startswith(opening):
            self._state, self._held = _State.OPENED, text[len(opening) :]
        elif opening.startswith(text):
            return False
        elif self._state is _State.OPENED:
            self._state, self._held = _State.THINKING, text
        else:
            self._state = _State.ANSWER
        return True

    def _think(self, pieces: list[Piece]) -> bool:
        text, closing = self._held, self._tags.close
        at = text.find(closing)
        end = at if at >= 0 else len(text) - overlap(text, closing)
        # spaces wait for what follows: before the closing tag they are left out
        ready = text[:end].rstrip()
        if ready:
            pieces.append(Reasoning(ready))
        if at < 0:
            self._held = text[len(ready) :]
            return False
        self._state, self._held = _State.CLOSED, text[at + len(closing) :]
        return True


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if tag.startswith(text[-size:])), 0)
