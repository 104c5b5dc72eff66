"""Validation of bodies with pydantic: the first error becomes an InvalidRequest that names the field."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from protocol.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

# by pydantic's error types: https://docs.pydantic.dev/latest/errors/validation_errors
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
    "string_pattern_mismatch": "must match {pattern}",
}


def parse(model_class: type[Model], data: Mapping[str, Any], *, strict: bool | None = None) -> Model:
    """Validate a body. `strict=False` also reads numbers from strings, as HTML forms send them.

    Raises InvalidRequest with the path of the invalid field in `param` ("messages.0.role"). The message never
    quotes text of the body, which may be a prompt.
    """
    try:
        return model_class.model_validate(dict(data), strict=strict)
    except ValidationError as error:
        raise _first_error(error, data) from None


def first_given(*values: Any) -> Any:
    """Return the first value that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def _first_error(error: ValidationError, data: Mapping[str, Any]) -> InvalidRequest:
    errors = [(_path(detail, data), detail) for detail in error.errors(include_url=False)]
    # every member of a union reports an error; the one with the longest path is the member that was meant
    top = errors[0][0]
    related = [(path, detail) for path, detail in errors if path[: len(top)] == top]
    path = max((path for path, _ in related), key=len)
    details = [detail for other, detail in related if other == path]
    param = ".".join(map(str, path))
    return InvalidRequest(f"{param or 'the body'}{_message(details)}", param=param or None)


def _path(detail: ErrorDetails, data: Any) -> tuple[int | str, ...]:
    """Return the path in the body: pydantic's path without the names of union members that it adds."""
    path: list[int | str] = []
    for part in detail["loc"]:
        known = (
            part in data if isinstance(data, Mapping) else isinstance(part, int) and isinstance(data, list)
        )
        if known:
            data = data[part]
        if known or (detail["type"] == "missing" and part == detail["loc"][-1]):
            path.append(part)
    return tuple(path)


def _message(details: list[ErrorDetails]) -> str:
    """Return what is wrong with one field, as the end of a sentence that begins with its name."""
    # prefer the error of a union member that accepts the type of the value
    detail = next((detail for detail in details if detail["type"] not in _TYPES), details[0])
    types = list(dict.fromkeys(_TYPES[d["type"]] for d in details if d["type"] in _TYPES))
    if "a number" in types:
        types = [name for name in types if name != "a whole number"]
    if types and detail["type"] in _TYPES:
        return f" must be {' or '.join(types)}, not {_type_name(detail['input'])}"
    context = detail.get("ctx", {})
    if detail["type"] in _RULES:
        value = detail["input"]
        shown = f" (it is {value})" if isinstance(value, int | float) and abs(value) < 10**15 else ""
        return f" {_RULES[detail['type']].format(**context)}{shown}"
    return f": {context.get('error') or detail['msg']}"


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a whole number", float: "a fraction", list: "a list", dict: "an object"}
    return kinds.get(type(value), "something else")
