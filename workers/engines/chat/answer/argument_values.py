"""Which values an argument may have that a model writes without JSON's quotes around a string."""

from typing import Any, NamedTuple

from workers.engines.chat.answer.lark import without

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
_OF_OBJECT = ANNOTATIONS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "x-guidance",
}
_OF_TEXT = ANNOTATIONS | {"type", "nullable", "minLength", "maxLength"}
_OF_CHOICE = ANNOTATIONS | {"type", "nullable", "enum", "const"}
_ORDER = ("integer", "number", "boolean", "null", "object", "array", "string")
"""In which a text is read as one of several types: "1" is a number, although a boolean may be written so,
too."""

_LARGEST = 10**18
"""Of numbers: beyond it lie those that are infinite as a double, which JSON doesn't know."""

_DEEPEST = 16


class Unenforceable(Exception):
    """What a schema asks for can't be told by the notation. `args`: one sentence for the client."""


class Text(NamedTuple):
    """A value that is written as it is: one of `choices`, or any text with `least` to `most` characters."""

    choices: tuple[str, ...] | None = None
    least: int = 0
    most: int | None = None
    null: bool = False
    """Whether it may be null instead, which is written as such."""


def properties_of(schema: Any) -> dict[str, Any] | None:
    """Return the properties that arguments may have; None: any. Raises Unenforceable."""
    if schema.get("type", "object") != "object":
        raise Unenforceable('it must have the type "object"')
    if schema.keys() - _OF_OBJECT:
        raise Unenforceable(
            "the model's notation of calls has room for properties, required and additionalProperties alone"
        )
    properties: dict[str, Any] = schema.get("properties", {})
    if not set(schema.get("required", ())) <= properties.keys():
        raise Unenforceable("each required name must be one of its properties")
    is_open = "properties" not in schema and schema.get("additionalProperties") is not False
    return None if is_open else properties


def types_of(schema: Any, root: Any, known: dict[str, tuple[str, ...]] | None = None) -> tuple[str, ...]:
    """Return the types that a value may have, in the order in which a text is read as them. Empty: unknown.

    `root`: the schema in which references are looked up. `known`: the types of references so far.
    """
    known = {} if known is None else known
    if not isinstance(schema, dict):
        return ()
    declared, reference = schema.get("type"), str(schema.get("$ref"))
    if isinstance(declared, str | list):
        found = [declared] if isinstance(declared, str) else declared
    elif "$ref" in schema:
        if reference not in known:
            # each is followed once: they may be circular, and each of many may have many
            known[reference] = ()
            known[reference] = types_of(target_of(reference, root), root, known)
        found = list(known[reference])
    elif (choices := choices_of(schema)) is not None:
        found = [_type_of(value) for value in choices]
    else:
        parts = [types_of(part, root, known) for part in alternatives_of(schema)]
        found = [name for part in parts for name in part] if all(parts) else []
    if found and schema.get("nullable") is True:
        found = [*found, "null"]
    return tuple(name for name in _ORDER if name in found) if set(map(str, found)) <= set(_ORDER) else ()


def text_of(schema: Any, root: Any) -> Text:
    """Return how a value that is a string, or null, is written. Raises Unenforceable."""
    text = _text(schema, root, 0)
    null = "null" in types_of(schema, root)
    if null and any(choice.strip() in ("null", "None") for choice in text.choices or ()):
        raise Unenforceable("a property may be null, and also a text that reads the same")
    return text


def _text(schema: Any, root: Any, depth: int) -> Text:
    types = types_of(schema, root)
    if not types or not set(types) <= {"string", "null"} or depth > _DEEPEST:
        raise Unenforceable(
            "in the model's notation of calls a property may be text, or of other types, but not both or of any"
        )
    null = "null" in types
    if (choices := choices_of(schema)) is not None:
        _allow(schema, _OF_CHOICE)
        return Text(tuple(value for value in choices if isinstance(value, str)), null=None in choices)
    if "$ref" in schema:
        _allow(schema, ANNOTATIONS | {"$ref"})
        return _text(target_of(schema["$ref"], root), root, depth + 1)
    if parts := alternatives_of(schema):
        _allow(schema, ANNOTATIONS | {"anyOf", "oneOf", "allOf"})
        texts = [part for part in parts if types_of(part, root) != ("null",)]
        if len(texts) != 1:
            raise Unenforceable("a property has several schemas for text")
        return _text(texts[0], root, depth + 1)._replace(null=null)
    _allow(schema, _OF_TEXT)
    return Text(None, schema.get("minLength", 0), schema.get("maxLength"), null)


def json_of(schema: Any, root: Any, forbidden: tuple[str, ...]) -> dict[str, Any]:
    """Return a schema for JSON whose strings have none of the `forbidden` texts, at which a call is cut.

    They are as in `lark.without`.
    """
    # not copied where nothing refers to them: there may be many properties, and many definitions
    referring = "$ref" in str(schema)
    definitions = root.get("$defs", {}) if referring else {}
    name = "plain" + "_" * max(map(len, ["", *definitions]))
    plain, pattern = {"$ref": f"#/$defs/{name}"}, f"^{without(forbidden)}$"
    everywhere = {
        "pattern": pattern,
        "minimum": -_LARGEST,
        "maximum": _LARGEST,
        "items": plain,
        "patternProperties": {pattern: plain},
        "additionalProperties": False,
    }
    own = {key: value for key, value in schema.items() if key != "x-guidance"}
    whole = {"allOf": [own, plain], "$defs": {**definitions, name: everywhere}}
    return whole | {
        key: root[key]
        for key in ("definitions", "x-guidance")
        if key in root and (referring or key != "definitions")
    }


def typed(tools: list[dict[str, Any]], *, quoted: bool) -> list[dict[str, Any]]:
    """Return tools whose properties name their types, where these can be found, as ResponseParser needs it.

    `quoted`: the notation tells strings from other values, so that one stays a string where it may be one.
    """
    made = []
    for tool in tools:
        function = tool["function"]
        root = function.get("parameters")
        properties = root.get("properties") if isinstance(root, dict) else None
        named, known = {}, {}  # type: dict[str, Any], dict[str, tuple[str, ...]]
        for key, schema in (properties if isinstance(properties, dict) else {}).items():
            types = types_of(schema, root, known)
            if not (quoted and "string" in types):
                named[key] = {"type": list(types)} if types else schema
        made.append({"function": {"name": function["name"], "parameters": {"properties": named}}})
    return made


def _allow(schema: dict[str, Any], keys: frozenset[str]) -> None:
    if schema.keys() - keys:
        raise Unenforceable(
            "in the model's notation of calls text may have an enum or bounds of its length, and nothing else"
        )


def choices_of(schema: dict[str, Any]) -> list[Any] | None:
    """The only values of a schema, None: there are others."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def alternatives_of(schema: dict[str, Any]) -> list[Any]:
    """The schemas of which a value fits one."""
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        if isinstance(parts, list) and (key != "allOf" or len(parts) == 1):
            return parts
    return []


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def target_of(reference: Any, root: Any) -> Any:
    """What a reference to a definition points to; None if it isn't one."""
    match str(reference).split("/"):
        case ["#", ("$defs" | "definitions") as place, name]:
            definitions = root.get(place) if isinstance(root, dict) else None
            return definitions.get(name) if isinstance(definitions, dict) else None
    return None
