"""Refuses schemas and grammars that would take too long, or too much memory, to compile.

llguidance bounds most of its work by itself (LIMITS in sources.py). These are the constructs for which that
is not enough. They hold for all schemas of a grammar together.
"""

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

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


class Amounts(NamedTuple):
    """What one or more schemas hold of that which is bounded."""

    names: int = 0
    values: int = 0
    multiples: frozenset[float] = frozenset()
    merges: bool = False
    """Whether `allOf` combines more than MAX_MERGED schemas in one that has more patterns than that."""

    @classmethod
    def of(cls, schemas: Schemas) -> "Amounts":
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
        merges = len(patterns) > MAX_MERGED and schemas.most_merged(MAX_MERGED + 1) > MAX_MERGED
        return cls(names, values, frozenset(multiples), merges)

    def joined(self, other: "Amounts") -> "Amounts":
        """The amounts of two schemas that are compiled into one grammar."""
        return Amounts(
            self.names + other.names,
            self.values + other.values,
            self.multiples | other.multiples,
            self.merges or other.merges,
        )

    def excess(self) -> str | None:
        """Return, for the client, which bound is exceeded; None: none."""
        if self.names > MAX_PROPERTIES:
            return f"schemas may name at most {MAX_PROPERTIES} properties; here they name {self.names}"
        if self.values > MAX_ENUM_VALUES:
            return f"schemas may have at most {MAX_ENUM_VALUES} enum values; here they have {self.values}"
        if self.merges:
            return f"allOf combines more than {MAX_MERGED} schemas, beside many a pattern or format"
        return _excess_of_multiples(self.multiples)


def excess_of_grammar(text: str) -> str | None:
    """Return, for the client, which bound a grammar in the syntax of Lark exceeds; None: none."""
    if len(_RULE.findall(text)) > MAX_RULES:
        return f"a grammar may have at most {MAX_RULES} rules"
    if "::=" in text and not _START.search(text):
        return "a grammar begins with a rule of GBNF, NAME ::= …, or it has a rule start as in Lark"
    if "%json" in text:
        return "%json is not supported in a grammar; send the schema by itself"
    return None


def _excess_of_multiples(multiples: Iterable[float]) -> str | None:
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
