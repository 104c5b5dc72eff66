"""Decodes JSON as Go's encoding/json does into typed fields: the way the real node reads bodies and answers.

A field's name matches in any case, null and unknown fields are harmless, a missing field is the zero value;
one wrong type anywhere, or NaN, makes the whole text invalid.
"""

import json
from typing import Any

Spec = Any
"""A type (`object`: anything), `[Spec]` for a list, `{"name": Spec}` for an object."""

_INT64 = range(-(2**63), 2**63)


class GoDecodeError(ValueError):
    """The text is not JSON, or a known field has the wrong type. The message says where."""


def decode(raw: bytes, spec: Spec, *, trailing: bool = False) -> Any:
    """The value with every field of `spec` filled in. `trailing`: what follows the first value is not read.

    Raises GoDecodeError.
    """
    text = raw.decode("utf-8", errors="replace").lstrip(" \t\r\n")
    try:
        decoder = json.JSONDecoder(parse_constant=_no_constant)
        value, end = decoder.raw_decode(text)
    except ValueError as error:
        raise GoDecodeError(f"not JSON: {error}") from error
    if not trailing and text[end:].strip(" \t\r\n"):
        raise GoDecodeError("not JSON: text follows the value")
    return _typed(value, spec, "body")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def zero(spec: Spec) -> Any:
    """The zero value that Go leaves in a missing field."""
    if isinstance(spec, dict):
        return {name: zero(inner) for name, inner in spec.items()}
    if isinstance(spec, list):
        return []
    return None if spec is object else spec()


def _typed(value: Any, spec: Spec, place: str) -> Any:
    if value is None:
        return zero(spec)
    if isinstance(spec, dict):
        return _struct(value, spec, place)
    if isinstance(spec, list):
        if not isinstance(value, list):
            raise GoDecodeError(f"{place}: a list was expected, not {value!r:.60}")
        return [_typed(item, spec[0], f"{place}[{index}]") for index, item in enumerate(value)]
    if spec is object:
        return value
    allowed = (int, float) if spec is float else (spec,)
    fits = isinstance(value, allowed) and (spec is bool or not isinstance(value, bool))
    if not fits or (spec is int and value not in _INT64):
        raise GoDecodeError(f"{place}: {spec.__name__} was expected, not {value!r:.60}")
    return value


def _struct(value: Any, spec: dict[str, Spec], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GoDecodeError(f"{place}: an object was expected, not {value!r:.60}")
    known = {name.lower(): name for name in spec}
    result = zero(spec)
    for key, inner in value.items():
        name = known.get(key.lower())
        if name is not None and inner is not None:
            result[name] = _typed(inner, spec[name], f"{place}.{name}")
    return dict(result)
