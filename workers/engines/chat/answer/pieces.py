"""The pieces that an answer's text is divided into."""

from typing import NamedTuple, Protocol

from protocol.events import Delta, Event, ReasoningDelta, TokenLogprob


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thinking before the answer."""

    text: str


Piece = Content | Reasoning


class Divider(Protocol):
    """Divides the text of one choice as it arrives."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the reasoning."""

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes. Text that may belong to a tag is held back."""

    def finish(self) -> list[Piece]:
        """Return the rest when no text follows."""


def to_event(piece: Piece, index: int, tokens: int, logprobs: list[TokenLogprob] | None) -> Event:
    """Make the event of a piece of choice `index`, with the tokens since the previous event."""
    if isinstance(piece, Reasoning):
        return ReasoningDelta(piece.text, index, tokens, logprobs)
    return Delta(piece.text, index, tokens, logprobs=logprobs)
