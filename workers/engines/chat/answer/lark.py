"""Writes texts in llguidance's Lark syntax."""

import json
import re
from collections.abc import Iterable, Mapping

_SPECIAL = frozenset("\\.+*?()|[]{}^$/&~-#\"'")


class LarkTexts:
    """Writes texts in which a tokenizer's added tokens may occur."""

    def __init__(self, added: Mapping[str, int]) -> None:
        """`added`: the ids of the added tokens by their text. A text in a grammar can't hold them."""
        self._added = added
        texts = sorted(added, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    def knows(self, *texts: str) -> bool:
        """Whether each of the texts is an added token."""
        return all(text in self._added for text in texts)

    def literal(self, text: str) -> str:
        """Return what stands for a text in a rule."""
        return " ".join(
            self.token(part) if part in self._added else json.dumps(part) for part in self._parts(text)
        )

    def token(self, text: str) -> str:
        """Return what stands for an added token in a rule."""
        return f"<[{self._added[text]}]>"

    def exactly(self, text: str, closing: str) -> str:
        """Return what stands in a rule for a text that has no added tokens, and then `closing`."""
        head = self._head(closing)
        literal = json.dumps(text + head).replace("\x7f", r"\u007f")
        return f"{literal} {self.literal(closing[len(head) :])}"

    def until(
        self, closing: str, forbidden: Iterable[str], least: int = 0, most: int | None = None
    ) -> tuple[str, str]:
        """Return the definition of a terminal, and what follows it in a rule: any text and then `closing`.

        The text has `least` to `most` characters, and none of the `forbidden`, as in `without`. `closing`
        should have one of them, so that it is clear where the text ends.
        """
        # a terminal ends where nothing can follow: what comes after the text must be a part of it
        head = self._head(closing)
        terminal = f"/{without(forbidden)}{escaped(head)}/"
        if least or most is not None:
            count = f"{{{least},{'' if most is None else most}}}"
            terminal = f"/(?s:.){count}{escaped(head)}/ & {terminal}"
        return terminal, self.literal(closing[len(head) :])

    def _head(self, text: str) -> str:
        """What of a text comes before its first added token."""
        first, *_ = [*self._parts(text), ""]
        return "" if first in self._added else first

    def _parts(self, text: str) -> list[str]:
        """Cut a text into added tokens and what is between them."""
        parts = self._tokens.split(text) if self._tokens else [text]
        return [part for part in parts if part]


def escaped(text: str) -> str:
    """Return a regular expression that a text alone matches, as llguidance and JSON Schema take it."""
    return "".join(_escape(character) for character in text)


def without(texts: Iterable[str]) -> str:
    """Return a regular expression for all texts that contain none of `texts`.

    Each of these has "<" at its beginning and nowhere else.
    """
    return f"[^<]*(?:<{_unlike([text[1:] for text in texts])})*"


def _unlike(rests: list[str]) -> str:
    """What may come, up to the next "<", where none of `rests` may follow."""
    firsts = sorted({rest[0] for rest in rests})
    branches = [f"[^<{escaped(''.join(firsts))}][^<]*"]
    for first in firsts:
        left = [rest[1:] for rest in rests if rest[0] == first]
        if "" not in left:
            branches.append(_escape(first) + _unlike(left))
    return f"(?:{'|'.join(branches)})?"


def _escape(character: str) -> str:
    if character < " " or character == "\x7f":
        return f"\\x{ord(character):02x}"
    return f"\\{character}" if character in _SPECIAL else character
