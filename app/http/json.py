"""JSON as clients read it."""

from typing import Any

import msgspec

_LINE_SEPARATORS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def encode_json(value: Any) -> bytes:
    """Encode a value on one line.

    The separators that are line breaks in Unicode but not in JSON are escaped: some clients split an event
    stream at them (Python's `splitlines`), and JavaScript once did not accept them in strings.
    """
    data = msgspec.json.encode(value)
    for separator, escaped in _LINE_SEPARATORS:
        if separator in data:
            data = data.replace(separator, escaped)
    return data
