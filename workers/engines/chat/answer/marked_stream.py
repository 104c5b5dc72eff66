"""Text with the names of some special tokens, which tokenizers leave out of a text."""

from collections.abc import Callable, Mapping

from workers.engines.chat.detokenizer import TextStream


class MarkedStream:
    """Yields the text of another stream, and the names of `shown` tokens between. Implements TextStream."""

    __slots__ = ("_make", "_shown", "_stream")

    def __init__(self, make: Callable[[], TextStream], shown: Mapping[int, str]) -> None:
        """`make` makes a stream for the tokens between two shown ones."""
        self._make = make
        self._shown = shown
        self._stream = make()

    def add(self, token: int) -> str:
        name = self._shown.get(token)
        if name is None:
            return self._stream.add(token)
        rest = self._stream.flush()
        self._stream = self._make()
        return rest + name

    def flush(self) -> str:
        return self._stream.flush()
