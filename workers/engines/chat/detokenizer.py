"""Turns tokens into text, one at a time: never half a character, never a stop string.

Pure Python. The tokens of a byte-level tokenizer are looked up as bytes and passed to an incremental UTF-8
decoder, which takes a microsecond. Any other tokenizer decodes a short window of tokens again for each new
one.
"""

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
UTF8 = codecs.getincrementaldecoder("utf-8")
LONGEST = 4
"""Largest number of bytes of a character in UTF-8."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a token of one byte."""

WINDOW = 4
"""Number of tokens after which a WindowStream shortens its window, at the end of a character."""


class TextStream(Protocol):
    """Yields complete characters as tokens arrive."""

    def add(self, token: int) -> str:
        """Return the text that `token` completes; may be empty."""

    def flush(self) -> str:
        """Return the rest when no token follows.

        Half a character becomes U+FFFD, as in the tokenizer's own decoding.
        """


class ByteStream:
    """For byte-level tokenizers. `table[token]` holds the token's bytes (empty for special tokens).

    `texts` is shared by all streams: what the tokens that consist of whole characters mean.
    """

    __slots__ = ("_decoder", "_inside", "_table", "_texts")

    def __init__(self, table: list[bytes], texts: dict[int, str]) -> None:
        self._table = table
        self._texts = texts
        self._decoder = UTF8(errors="replace")
        self._inside = False
        """Whether the tokens so far may end inside a character."""

    def add(self, token: int) -> str:
        if not self._inside and (known := self._texts.get(token)) is not None:
            return known
        own = self._table[token] if token < len(self._table) else b""
        text = self._decoder.decode(own)
        if not self._inside and text.encode() == own:
            self._texts[token] = text
        else:
            self._inside = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """For any tokenizer: decodes the last few tokens again with each new one.

    Earlier tokens are decoded too because a tokenizer may drop the space of a first word (SentencePiece
    does). The window starts where a character starts and is shortened regularly, which makes about five calls
    of the tokenizer for four tokens.
    """

    __slots__ = ("_decode", "_read", "_text", "_tokens")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._read = 0
        """Number of tokens of the window whose text, `_text`, was returned."""
        self._text = ""

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        unread = len(self._tokens) - self._read
        # with more tokens than a character has bytes, this one will never be complete
        if (text.endswith(REPLACEMENT) and unread <= LONGEST) or len(text) <= len(self._text):
            return ""
        gained = text[len(self._text) :]
        if len(self._tokens) > WINDOW:
            self._tokens = self._tokens[self._read :]
            text = self._decode(self._tokens)
        self._read, self._text = len(self._tokens), text
        return gained

    def flush(self) -> str:
        return self._decode(self._tokens)[len(self._text) :]


class StopMatcher:
    """Cuts text at the first stop string, and holds back text that may become the beginning of one."""

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Return the text that can be sent, and the stop string that ended it, if any."""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: hit[0])
            self._held = ""
            return text[:at], stop
        # hold back the longest suffix that is the beginning of a stop string
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size], None
        self._held = ""
        return text, None

    def flush(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """The text of one choice.

    Both methods return the text that can be sent, and the stop string that ended it, if any.
    """

    __slots__ = ("_matcher", "_stream")

    def __init__(self, stream: TextStream, stops: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stops) if stops else None

    def add(self, token: int, may_stop: bool = True) -> tuple[str, str | None]:
        """Add a token. With `may_stop` False (min_tokens not reached) stop strings pass as ordinary text."""
        text = self._stream.add(token)
        if self._matcher is None:
            return text, None
        if not may_stop:
            return self._matcher.flush() + text, None
        return self._matcher.add(text)

    def flush(self) -> tuple[str, str | None]:
        """Return the rest when no token follows."""
        text = self._stream.flush()
        if self._matcher is None:
            return text, None
        text, stop = self._matcher.add(text)
        return text + self._matcher.flush(), stop


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as text: streamed, or each by itself for logprobs."""

    table: list[bytes] | None
    decode: Callable[[list[int]], str]
    pieces: dict[int, str] = field(default_factory=dict)
    """Each token as the vocabulary spells it, `▁the` or `<0x0A>` for example."""
    special: frozenset[int] = frozenset()
    described: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    """Filled by the streams: tokens that consist of whole characters."""

    def stream(self) -> TextStream:
        return ByteStream(self.table, self.texts) if self.table is not None else WindowStream(self.decode)

    def detokenizer(self, stops: tuple[str, ...]) -> Detokenizer:
        return Detokenizer(self.stream(), stops)

    def continuing(self, tokens: list[int], stops: tuple[str, ...]) -> Detokenizer:
        """Make the detokenizer of a text that continues that of `tokens`: its first token keeps its space."""
        stream = self.stream()
        for token in tokens[-WINDOW:]:
            stream.add(token)
        return Detokenizer(stream, stops)

    def token_bytes(self, token: int) -> bytes:
        """The token's bytes by itself, for logprobs: two tokens that differ give different bytes.

        Decoding would drop the space of `▁the` and show half a character for a byte token. A special token
        gives its name.
        """
        if self.table is not None and token not in self.special:
            return self.table[token] if token < len(self.table) else b""
        piece = self.pieces.get(token, "")
        if token not in self.special:
            if byte := BYTE_TOKEN.fullmatch(piece):
                return bytes([int(byte[1], 16)])
            piece = piece.replace("▁", " ")
        return piece.encode()

    def describe(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of a token by itself, for logprobs."""
        if token not in self.described:
            own = self.token_bytes(token)
            self.described[token] = own.decode("utf-8", errors="replace"), list(own)
        return self.described[token]

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """Read a transformers tokenizer. Special tokens have no text."""
        backend = getattr(tokenizer, "backend_tokenizer", None)

        def decode(tokens: list[int]) -> str:
            if backend is not None:
                # called directly: transformers' wrappers take five times as long as the backend
                fast: str = backend.decode(tokens, skip_special_tokens=True)
                return fast
            text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text

        pieces = {token: text for text, token in tokenizer.get_vocab().items()}
        special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        return cls(_byte_table(tokenizer), decode, pieces, special)


def _byte_table(tokenizer: Any) -> list[bytes] | None:
    """Return each token's bytes, or None if the tokenizer isn't byte-level."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part]
    if kinds != ["ByteLevel"]:
        return None
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    table = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for text, token in tokenizer.get_vocab().items():
        if token not in special:
            # a token with a character outside the map was added as plain text
            plain = all(character in byte_of for character in text)
            table[token] = bytes(byte_of[character] for character in text) if plain else text.encode()
    return table


def _byte_characters() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters. It moves the other bytes above 255."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(moved)}
