"""Follows a JSON object whose text arrives in parts."""

import json
from typing import Any


class ObjectText:
    """Finds the object's end. Whether the text is JSON is not looked at.

    Models write line breaks inside strings, where JSON allows none: these are escaped.
    """

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self, depth: int = 0) -> None:
        """`depth`: number of brackets that are open before the text."""
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def read(self, text: str) -> tuple[str, int]:
        """Return what of `text` belongs to the object, with escapes, and the place behind it.

        The place is -1 if the object does not end in `text`.
        """
        out: list[str] = []
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
                if character < " ":
                    character = json.dumps(character)[1:-1]
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return "".join(out) + character, at + 1
            out.append(character)
        return "".join(out), -1


def parse_object(text: Any) -> dict[str, Any] | None:
    """Return the object that a text is, also with line breaks in its strings; None if it is no object.

    Its strings can be encoded, as `write_json` says.
    """
    try:
        value = json.loads(text, strict=False) if isinstance(text, str) else None
        if isinstance(value, dict) and "\\u" in text:
            value = json.loads(write_json(value))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(value: Any) -> str:
    """Return a value as JSON, with characters as they are.

    Halves of surrogate pairs, which an escape such as \\ud800 makes and no encoding knows, become U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
