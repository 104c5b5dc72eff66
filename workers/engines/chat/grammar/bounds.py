"""Refuses schemas and grammars that would take too long, or too much memory, to compile.

llguidance bounds most of its work by itself (LIMITS in compiler.py). These are the constructs for which that
is not enough.
"""

import re
from decimal import Decimal

from workers.engines.chat.grammar.schema import Schemas, is_number, items, mapping

MAX_PROPERTIES = 1000
"""Names in all `properties`, `patternProperties` and `required`."""

MAX_ENUM_VALUES = 1000
"""Values in all `enum`."""

MAX_MULTIPLE_OF = 100_000
"""A `multipleOf` without its decimal point. The states of an automaton are in proportion to it."""

MAX_PRODUCT = 20_000
"""All different `multipleOf` multiplied, each without decimal point and trailing zeros.

`allOf` may combine them.
"""

MAX_MERGED = 12
"""Schemas of one value that `allOf` combines. Patterns may intersect in 2 ** MAX_MERGED states."""

MAX_RULES = 1000
"""Of a grammar."""

_RULE = re.compile(r"^[ \t]*[?!]*[A-Za-z_][\w.-]*[ \t]*(?:\[[^\]\n]*\]|::\w+)?[ \t]*:", re.MULTILINE)

_START = re.compile(r"^[ \t]*start\b", re.MULTILINE)


def excess_of_schema(schemas: Schemas) -> str | None:
    """Return, for the client, which bound a JSON Schema exceeds; None: none."""
    names = values = 0
    multiples: set[float] = set()
    patterns: set[str] = set()
    for schema in schemas.all:
        parts = (schema.get(key) for key in ("properties", "patternProperties", "required"))
        names += sum(len(part) for part in parts if isinstance(part, dict | list))
        values += len(items(schema.get("enum")))
        patterns |= {str(schema[key]) for key in ("pattern", "format") if key in schema}
        patterns |= set(mapping(schema.get("patternProperties")))
        if is_number(schema.get("multipleOf")):
            multiples.add(schema["multipleOf"])
    if names > MAX_PROPERTIES:
        return f"a schema may name at most {MAX_PROPERTIES} properties; this one names {names}"
    if values > MAX_ENUM_VALUES:
        return f"a schema may have at most {MAX_ENUM_VALUES} enum values; this one has {values}"
    if len(patterns) > MAX_MERGED and schemas.most_merged(MAX_MERGED + 1) > MAX_MERGED:
        return f"allOf combines more than {MAX_MERGED} schemas, beside many a pattern or format"
    return _excess_of_multiples(multiples)


def excess_of_grammar(text: str) -> str | None:
    """Return, for the client, which bound a grammar in the syntax of Lark exceeds; None: none."""
    if len(_RULE.findall(text)) > MAX_RULES:
        return f"a grammar may have at most {MAX_RULES} rules"
    if "::=" in text and not _START.search(text):
        return "the grammar must be one of Lark, with a rule start; GBNF is not supported"
    if "%json" in text:
        return "%json is not supported in a grammar; send the schema by itself"
    return None


def _excess_of_multiples(multiples: set[float]) -> str | None:
    product = 1
    for multiple in multiples:
        digits = Decimal(str(multiple)).normalize().as_tuple()
        if not isinstance(digits.exponent, int):
            return "multipleOf must be a finite number"
        coefficient = int("".join(map(str, digits.digits)))
        if coefficient * 10 ** min(20, max(0, digits.exponent)) > MAX_MULTIPLE_OF:
            return f"multipleOf must be at most {MAX_MULTIPLE_OF:,} (without its decimal point)"
        product *= coefficient
    if product > MAX_PRODUCT:
        return f"all multipleOf multiplied, without trailing zeros, must be at most {MAX_PRODUCT:,}"
    return None
