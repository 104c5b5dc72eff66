"""Says why a schema or grammar is refused, without quoting it.

An error never holds what a client has written.
"""

import re

_EXCERPT = re.compile(r"\s*(\d+ \||\^|<non-verbose)|    ")
"""Lines of llguidance's messages that show the text and point at a place in it."""

_CUT = re.compile(r"(lexer error|regex is empty|unknown format|invalid type|invalid URI reference)\b.*", re.I)
"""Messages of llguidance that end with the client's text as it is."""

_DIGITS = re.compile("^(int too large|Exceeds the limit)|number out of range")
"""Said by float, json and llguidance."""

_QUOTED = re.compile(r'"((?:\\.|[^"\\])*)"|/.*/')

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
        "if",
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
    if _DIGITS.search(reason):
        return "a number must have at most 308 digits"
    if "NoExtension" in reason:
        return "no text would fit it"
    # not splitlines: it would also cut an excerpt at the client's U+2028
    lines = (line for line in reason.split("\n") if not _EXCERPT.match(line))
    own = text.lower()

    def kept(word: re.Match[str]) -> str:
        return "…" if word[0].lower() in own and word[0] not in _KEYWORDS else word[0]

    def quoted(part: re.Match[str]) -> str:
        return part[0] if part[1] and part[1].removeprefix("$") in _KEYWORDS else '"…"'

    line = _CUT.sub(r"\1", " ".join(" ".join(lines).split()))
    redacted = _WORD.sub(kept, _QUOTED.sub(quoted, line))
    return re.sub(r"…[^\s\"']*…", "…", redacted)[:300]
