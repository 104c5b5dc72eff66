"""The pieces that an answer's text is divided into."""

from typing import NamedTuple, Protocol

from protocol.events import Delta, Event, ReasoningDelta, TokenLogprob, ToolCallDelta


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thinking before the answer."""

    text: str


class CallStart(NamedTuple):
    """The beginning of a call. `number` counts the calls of an answer from 0."""

    number: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A part of a call's arguments, which are a JSON object as text."""

    number: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


class Divider(Protocol):
    """Divides the text of one choice as it arrives."""

    calls: list[int]
    """The numbers of the complete calls. Others began and turned out to be none."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the reasoning."""

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes. Text that may belong to a tag is held back."""

    def finish(self, cut: bool) -> list[Piece]:
        """Return the rest when no text follows. `cut`: the model was not at its end.

        The head of a call that was cut is left out.
        """


def to_event(piece: Piece, index: int, tokens: int, logprobs: list[TokenLogprob] | None) -> Event:
    """Make the event of a piece of choice `index`, with the tokens since the previous event."""
    match piece:
        case Content(text):
            return Delta(text, index, tokens, logprobs=logprobs)
        case Reasoning(text):
            return ReasoningDelta(text, index, tokens, logprobs)
        case CallStart(number, id, name):
            return ToolCallDelta(number, index, tokens, logprobs, id=id, name=name)
        case CallArguments(number, text):
            return ToolCallDelta(number, index, tokens, logprobs, arguments=text)
