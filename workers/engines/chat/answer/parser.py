"""The text of one choice on its way to the client: divided into pieces, with stop strings in its content."""

from workers.engines.chat.answer.pieces import Content, Divider, Piece
from workers.engines.chat.detokenizer import StopMatcher


class AnswerParser:
    """Divides the text of one choice. Stop strings end the content; reasoning may contain them."""

    def __init__(self, divider: Divider, stops: tuple[str, ...] = ()) -> None:
        self._divider = divider
        self._matcher = StopMatcher(stops) if stops else None
        self.reasoning_tokens = 0
        """Number of tokens of the reasoning and its tags, from the token that completes the first tag."""

    def feed(self, text: str, may_stop: bool = True) -> tuple[list[Piece], str | None]:
        """Add the text of one token, which may be empty.

        Returns the pieces that can be sent, and the stop string that ended the content, if any. With `may_stop`
        False (min_tokens not reached) stop strings pass as ordinary text.
        """
        before = self._divider.thinking
        pieces = self._divider.feed(text)
        self.reasoning_tokens += before or self._divider.thinking
        return self._stop(pieces, may_stop)

    def finish(self, text: str) -> tuple[list[Piece], str | None]:
        """Add the last text, which belongs to no further token, and return the rest."""
        pieces, stop = self._stop([*self._divider.feed(text), *self._divider.finish()], True)
        if self._matcher is not None and stop is None and (held := self._matcher.flush()):
            pieces.append(Content(held))
        return pieces, stop

    def _stop(self, pieces: list[Piece], may_stop: bool) -> tuple[list[Piece], str | None]:
        if self._matcher is None:
            return pieces, None
        sent: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, Content):
                sent.append(piece)
                continue
            text, stop = (
                self._matcher.add(piece.text) if may_stop else (self._matcher.flush() + piece.text, None)
            )
            if text:
                sent.append(Content(text))
            if stop is not None:
                return sent, stop
        return sent, None
