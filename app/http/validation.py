"""Pydantic's findings in plain words: the first complaint about a body as one InvalidRequest that names the field."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from protocol.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

# By pydantic's error type, https://docs.pydantic.dev/latest/errors/validation_errors; {} are filled from its context
_TYPES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_RULES = {
    "missing": "is required",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be one of {expected}",
}


def parse(model_class: type[Model], data: Mapping[str, Any], *, strict: bool | None = None) -> Model:
    """Validate a body. `strict=False` also reads numbers from strings, as HTML forms send them.

    Raises InvalidRequest with the field at fault in `param` ("messages.0.role"). The message never quotes text that the
    caller sent, since that may be a prompt.
    """
    try:
        return model_class.model_validate(dict(data), strict=strict)
    except ValidationError as error:
        raise _first_complaint(error, data) from None


def _first_complaint(error: ValidationError, data: Mapping[str, Any]) -> InvalidRequest:
    complaints = [(_place(detail, data), detail) for detail in error.errors(include_url=False)]
    # alternatives of a union each complain about the same place; the one that came deepest is what was meant
    top = complaints[0][0]
    related = [(place, detail) for place, detail in complaints if place[: len(top)] == top]
    place = max((place for place, _ in related), key=len)
    details = [detail for other, detail in related if other == place]
    param = ".".join(map(str, place))
    return InvalidRequest(f"{param or 'the body'}{_words(details)}", param=param or None)


def _place(detail: ErrorDetails, data: Any) -> tuple[int | str, ...]:
    """Where in the caller's own data: pydantic's path without the names of union members that it adds."""
    place: list[int | str] = []
    for part in detail["loc"]:
        known = (
            part in data if isinstance(data, Mapping) else isinstance(part, int) and isinstance(data, list)
        )
        if known:
            data = data[part]
        if known or (detail["type"] == "missing" and part == detail["loc"][-1]):
            place.append(part)
    return tuple(place)


def _words(details: list[ErrorDetails]) -> str:
    # a member of a union that took the value's type has the better complaint
    detail = next((detail for detail in details if detail["type"] not in _TYPES), details[0])
    types = list(dict.fromkeys(_TYPES[d["type"]] for d in details if d["type"] in _TYPES))
    if "a number" in types:
        types = [name for name in types if name != "a whole number"]
    if types and detail["type"] in _TYPES:
        return f" must be {' or '.join(types)}, not {_kind(detail['input'])}"
    context = detail.get("ctx", {})
    if detail["type"] in _RULES:
        value = detail["input"]
        shown = f" (it is {value})" if isinstance(value, int | float) and abs(value) < 10**15 else ""
        return f" {_RULES[detail['type']].format(**context)}{shown}"
    return f": {context.get('error') or detail['msg']}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a whole number", float: "a fraction", list: "a list", dict: "an object"}
    return kinds.get(type(value), "something else")
