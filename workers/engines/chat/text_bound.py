"""Tells from a text's characters alone that it has too many tokens. Encoding megabytes takes seconds.

No token is longer than the longest of the vocabulary. That says something about a text only if the tokenizer
puts every character into a token: many drop spaces, compose accents or join unknown characters.
"""

import json
import unicodedata
from typing import Any

KEEPING_PARTS = frozenset({"ByteLevel", "Digits", "Metaspace", "Prepend"})
"""Steps before the tokenizer's model that drop no character."""

REMOVED = "Removed"
"""The behavior of a split that drops what it splits at."""


class TextBound:
    """A lower bound of a text's number of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer."""
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            self._keeps = False
            return
        parts = _parts(backend.normalizer) + _parts(backend.pre_tokenizer)
        kinds = {part["type"] for part in parts}
        self._composes = "NFC" in kinds
        # added tokens may take the spaces beside them, however many
        self._strips = any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())
        by_byte = "ByteLevel" in kinds or getattr(backend.model, "byte_fallback", False)
        self._keeps = by_byte and type(backend.model).__name__ == "BPE" and all(map(_keeps, parts))

    def tokens(self, text: str) -> int:
        """Return a number of tokens that the text has at least; 0 if the tokenizer may drop characters."""
        if not self._keeps:
            return 0
        if self._composes:
            text = unicodedata.normalize("NFC", text)
        characters = sum(map(len, text.split())) if self._strips else len(text)
        return -(-characters // self._longest)


def _parts(step: Any) -> list[dict[str, Any]]:
    """Return a normalizer or pre-tokenizer, or the steps of a sequence, as their JSON objects."""
    if step is None:
        return []
    found: dict[str, Any] = json.loads(step.__getstate__())
    return found.get("normalizers") or found.get("pretokenizers") or [found]


def _keeps(part: dict[str, Any]) -> bool:
    """Whether a step drops no character. NFC does, but its result is known."""
    if part["type"] == "Split":
        return bool(part["behavior"] != REMOVED)
    if part["type"] == "Replace":
        replaced = part["pattern"].get("String")
        return replaced is not None and len(part["content"]) >= len(replaced)
    return part["type"] in KEEPING_PARTS | {"NFC"}
