"""Looks at the schemas within a JSON Schema."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_NO_CONSTRAINTS = {"$ref", *_IN_PLACE, "$defs", "definitions", "$schema", "$id", "$comment"}
_NO_CONSTRAINTS |= {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}


class Schemas:
    """A JSON Schema and all that it holds."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._merged: dict[int, int] = {}

    @cached_property
    def all(self) -> list[dict[str, Any]]:
        """Each schema once, wherever a `$ref` may point to."""
        found: dict[int, dict[str, Any]] = {}
        open_ = [self.root]
        while open_:
            schema = open_.pop()
            if isinstance(schema, dict) and id(schema) not in found:
                found[id(schema)] = schema
                open_ += [*_children(schema), *_in_place(schema), self._target(schema)]
        return list(found.values())

    def most_merged(self, enough: int) -> int:
        """The largest number of schemas that `allOf` and `$ref` combine for one value, or `enough` or more.

        What one of them says of a property is taken to meet what each of the others says.
        """
        most = 1
        seen: set[tuple[int, int]] = set()
        open_ = [(self.root, 1)]
        while open_ and most < enough:
            schema, outside = open_.pop()
            if not isinstance(schema, dict) or (id(schema), outside) in seen:
                continue
            seen.add((id(schema), outside))
            own = outside * max(1, self._merged_in_place(schema, ()))
            most = max(most, own)
            open_ += [(child, own) for child in _children(schema)]
            open_ += [(other, outside) for other in (*_in_place(schema), self._target(schema))]
        return most

    def _merged_in_place(self, schema: Any, above: tuple[int, ...]) -> int:
        if not isinstance(schema, dict) or id(schema) in above:
            return 0
        if id(schema) not in self._merged:
            above = (*above, id(schema))
            count = 1 if schema.keys() - _NO_CONSTRAINTS else 0
            count += self._merged_in_place(self._target(schema), above)
            for key in _IN_PLACE:
                parts = [self._merged_in_place(part, above) for part in items(schema.get(key))]
                count += sum(parts) if key == "allOf" else max(parts, default=0)
            self._merged[id(schema)] = count
        return self._merged[id(schema)]

    def _target(self, schema: dict[str, Any]) -> Any:
        """What the schema's `$ref` points to; None if there is nothing."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found = self.root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                found = mapping(found).get(key)
        return found


def _children(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of values within the one that a schema describes, and its definitions."""
    for key in _OF_NAMES:
        yield from mapping(schema.get(key)).values()
    for key in ("prefixItems", "items"):
        yield from items(schema.get(key))
    for key in ("items", "additionalItems", "additionalProperties"):
        yield schema.get(key)


def _in_place(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of the same value."""
    for key in _IN_PLACE:
        yield from items(schema.get(key))


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether a value is a number in JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)
