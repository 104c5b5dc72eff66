"""Says why a schema or grammar is refused, without quoting it.

An error never holds what a client has written.
"""

import re

_EXCERPT = re.compile(r"\s*(\d+ \||\^|<non-verbose)|    ")
"""Lines of llguidance's messages that show the text and point at a place in it."""

_WORD = re.compile(r"\w{3,}")

_KEYWORDS = frozenset(
    [
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "contains",
        "contentEncoding",
        "contentMediaType",
        "defs",
        "definitions",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "dynamicAnchor",
        "dynamicRef",
        "else",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxContains",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minContains",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "patternProperty",
        "prefixItems",
        "properties",
        "property",
        "propertyNames",
        "recursiveRef",
        "ref",
        "required",
        "schema",
        "then",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
        "array",
        "boolean",
        "integer",
        "null",
        "number",
        "object",
        "string",
        "regex",
        "regexes",
        "unimplemented",
        "keys",
        "unknown",
        "value",
        "values",
    ]
)
"""What may be named although it stands in the client's text."""


def explain(reason: str, text: str) -> str:
    """Return a message of llguidance in one line, without words of `text` but JSON Schema's own."""
    if "coerce_one_of" in reason:
        return "oneOf is supported only where no value can match two of its schemas; use anyOf"
    if "NoExtension" in reason:
        return "no text would fit it"
    lines = (line for line in reason.splitlines() if not _EXCERPT.match(line))
    own = text.lower()

    def kept(word: re.Match[str]) -> str:
        return "…" if word[0].lower() in own and word[0] not in _KEYWORDS else word[0]

    redacted = _WORD.sub(kept, " ".join(" ".join(lines).split()))
    return re.sub(r"…[^\s\"']*…", "…", redacted)[:300]
