"""What llguidance enforces less strictly than JSON Schema says.

Found by comparing random answers to random schemas with the jsonschema package. It writes the 29th of
February in any year, a property's name twice where only the number of properties is bounded, and with
exclusive bounds less than 1 apart an integer bound itself. It reads references and options that the checks
here don't see.
"""

import re
from typing import Any

from workers.engines.chat.grammar.schema import Schemas, is_number, items

_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}

FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Patterns of RFC 3339 for years from 1, in upper case and without leap seconds.

Every library reads these.
"""


def unenforceable(schemas: Schemas) -> str | None:
    """Return, for the client, what llguidance would take but not enforce; None: nothing."""
    for schema in schemas.all:
        if "x-guidance" in schema:
            return "x-guidance is not supported"
        if schema is not schemas.root and {"$id", "id", "$anchor"} & schema.keys():
            return "$id and $anchor are supported at the top of a schema only"
        reference = schema.get("$ref", "#")
        if isinstance(reference, str) and not re.match("#(/|$)", reference):
            return '$ref must be "#" or begin with "#/"'
        least = schema.get("minProperties", 0)
        if is_number(least) and least > len(set(map(str, items(schema.get("required"))))) + 1:
            return "minProperties is supported up to the number of required properties and one more"
        if _meet([schema]):
            return "exclusiveMinimum and exclusiveMaximum of a number need bounds that are at least 1 apart"
    if any(COMBINING & schema.keys() for schema in schemas.all) and _meet(schemas.all):
        return (
            "exclusiveMinimum and exclusiveMaximum need bounds at least 1 apart, in schemas that are combined"
        )
    return None


def _meet(schemas: list[dict[str, Any]]) -> bool:
    """Whether an integer that is excluded as a bound is less than 1 from another bound."""
    lower, upper, below, above = (
        {float(schema[key]) for schema in schemas if is_number(schema.get(key))}
        for key in ("exclusiveMinimum", "exclusiveMaximum", "minimum", "maximum")
    )
    ends = [(bound, other - bound) for bound in lower for other in upper | above]
    ends += [(bound, bound - other) for bound in upper for other in lower | below]
    return any(bound.is_integer() and 0 < distance < 1 for bound, distance in ends)


def correct(schemas: Schemas) -> None:
    """Replace formats by patterns, in place, where llguidance's own are not exact.

    What says nothing is left out, as that names are strings: libraries write it, and llguidance refuses it.
    """
    for schema in schemas.all:
        if schema.get("propertyNames") in ({"type": "string"}, {}, True):
            del schema["propertyNames"]
        pattern = FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
        if pattern is None:
            continue
        if "pattern" not in schema:
            del schema["format"]
            schema["pattern"] = pattern
        elif isinstance(schema.get("allOf", []), list):
            schema["allOf"] = [*items(schema.get("allOf")), {"pattern": pattern}]
