"""The text of one choice on its way to the client: divided into pieces, with stop strings in its content."""

from workers.engines.chat.answer.pieces import CallArguments, CallStart, Content, Divider, Piece
from workers.engines.chat.detokenizer import StopMatcher


class AnswerParser:
    """Divides the text of one choice. Stop strings end the content; reasoning and calls may contain them."""

    def __init__(
        self,
        dividers: list[Divider],
        stops: tuple[str, ...] = (),
        *,
        has_tools: bool = False,
        parallel: bool = True,
    ) -> None:
        """`dividers`: each divides the content that the one before leaves.

        With `has_tools` spaces between content and calls are left out. Without `parallel` an answer has one
        call at most.
        """
        self._dividers = dividers
        self._matcher = StopMatcher(stops) if stops else None
        self._has_tools = has_tools
        self._parallel = parallel
        self._spaces = ""
        """At the end of the content so far: left out if a call follows."""
        self.reasoning_tokens = 0
        """Number of tokens of the reasoning and its tags, from the token that completes the first tag."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return any(divider.thinking for divider in self._dividers)

    @property
    def calls(self) -> int:
        """Number of complete calls."""
        return sum(len(divider.calls) for divider in self._dividers)

    @property
    def complete(self) -> bool:
        """Whether the answer must end here."""
        return not self._parallel and self.calls > 0

    def feed(self, text: str, may_stop: bool = True) -> tuple[list[Piece], str | None]:
        """Add the text of one token, which may be empty.

        Returns the pieces that can be sent, and the stop string that ended the content, if any. With
        `may_stop` False (min_tokens not reached) stop strings pass as ordinary text.
        """
        before = self.thinking
        pieces = self._divide(text)
        self.reasoning_tokens += before or self.thinking
        return self._send(pieces, may_stop)

    def finish(self, text: str, cut: bool) -> tuple[list[Piece], str | None]:
        """Add the last text, which belongs to no further token, and return the rest.

        `cut`: the model was not at its end.
        """
        pieces = self._divide(text)
        for at, divider in enumerate(self._dividers):
            pieces += self._through(divider.finish(cut), at + 1)
        sent, stop = self._send(pieces, True)
        if stop is None:
            held = self._matcher.flush() if self._matcher else ""
            if rest := self._visible(held, last=True):
                sent.append(Content(rest))
        return sent, stop

    def _divide(self, text: str) -> list[Piece]:
        return self._through([Content(text)] if text else [], 0)

    def _through(self, pieces: list[Piece], first: int) -> list[Piece]:
        """Return the pieces that the dividers from number `first` on make of the content in `pieces`."""
        for divider in self._dividers[first:]:
            pieces = [
                part
                for piece in pieces
                for part in (divider.feed(piece.text) if isinstance(piece, Content) else [piece])
            ]
        return pieces

    def _send(self, pieces: list[Piece], may_stop: bool) -> tuple[list[Piece], str | None]:
        sent: list[Piece] = []
        for piece in pieces:
            stop = None
            if isinstance(piece, Content):
                text, stop = self._match(piece.text, may_stop)
                if text := self._visible(text, last=stop is not None):
                    sent.append(Content(text))
            else:
                if isinstance(piece, CallStart | CallArguments) and self._is_surplus(piece.number):
                    return sent, None
                if isinstance(piece, CallStart):
                    if text := self._visible(self._matcher.flush() if self._matcher else ""):
                        sent.append(Content(text))
                    self._spaces = ""
                sent.append(piece)
            if stop is not None:
                return sent, stop
        return sent, None

    def _is_surplus(self, number: int) -> bool:
        """Whether there may be one call and a complete one comes before call `number`."""
        return not self._parallel and any(
            made < number for divider in self._dividers for made in divider.calls
        )

    def _match(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        if self._matcher is None:
            return text, None
        return self._matcher.add(text) if may_stop else (self._matcher.flush() + text, None)

    def _visible(self, text: str, last: bool = False) -> str:
        """Return the content that can be sent: without the spaces at its end, which may come before a
        call."""
        if not self._has_tools:
            return text
        text = self._spaces + text
        ready = text if last and not self.calls else text.rstrip()
        self._spaces = "" if last else text[len(ready) :]
        return ready
