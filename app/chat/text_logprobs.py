"""The logprobs object of completions: parallel lists, and where each token begins in the text."""

import codecs
from typing import Any

from protocol.events import TokenLogprob

_UTF8 = codecs.getincrementaldecoder("utf-8")


class TextLogprobs:
    """Makes the logprobs objects of one choice, in order.

    The text of a choice has characters, and a token may be a part of one: `text_offset` is where the first
    character begins that a token completes. Tokens of the prompt that are not in its text, such as one for
    its beginning, have the offset of the next.
    """

    __slots__ = ("_decoder", "_echoes", "_offset", "_prompt")

    def __init__(self) -> None:
        self._prompt = ""
        self._echoes = False
        self._offset = 0
        self._decoder = _UTF8(errors="replace")

    def begin(self, prompt: str) -> None:
        """Note the prompt that the text begins with."""
        self._prompt, self._echoes = prompt, True

    def of_prompt(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the object for tokens of the prompt."""
        return self._body(tokens)

    def of_answer(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the object for generated tokens."""
        if self._echoes:
            self._echoes, self._offset = False, len(self._prompt)
            self._decoder.reset()
        return self._body(tokens)

    def _body(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "text_offset": [self._next_offset(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "tokens": [token.token for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
        }

    def _next_offset(self, token: TokenLogprob) -> int:
        offset = self._offset
        text = self._decoder.decode(bytes(token.bytes))
        if self._echoes and not self._prompt.startswith(text, offset):
            # the space that SentencePiece puts before a first word, or a token that isn't in the text
            text = text[1:] if text[:1] == " " else ""
            text = text if self._prompt.startswith(text, offset) else ""
        self._offset += len(text)
        return offset


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """Return the most probable tokens, and the token itself.

    Of tokens with equal text the best one counts.
    """
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in token.top:
        found.setdefault(each.token, each.logprob)
    found.setdefault(token.token, token.logprob)
    return found
