"""Writes the grammar of an answer with calls in Gemma's notation, in llguidance's Lark syntax.

It is like JSON: names have no quotes, and strings have a mark of their own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from workers.engines.chat.answer.argument_values import (
    ANNOTATIONS,
    Unenforceable,
    alternatives_of,
    choices_of,
    json_of,
    properties_of,
    target_of,
    text_of,
    types_of,
)
from workers.engines.chat.answer.call_grammar import CallableTool
from workers.engines.chat.answer.lark import LarkTexts
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.tag_format import around_arguments
from workers.engines.chat.answer.thinking import ThinkTags

_NAME = re.compile("[A-Za-z0-9_]+")
_THOUGHT, _THOUGHT_END = "<|channel>", "<channel|>"
_READABLE = r"/[^\x01\x02]*/"
"""The characters that the family's parser uses itself."""

_ANYTHING = r"""anything: string | SCALAR | "[" (anything ("," anything)*)? "]" | "{" (pair ("," pair)*)? "}"
pair: NAME ":" anything
NAME: /[A-Za-z0-9_]{1,64}/
SCALAR: /true|false|null|-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/
"""


class _Root(NamedTuple):
    """A tool's schema. `rules`: the names of those for the definitions in it, by reference."""

    schema: Any
    name: str
    rules: dict[str, str]


class GemmaFormat(NamedTuple):
    """`opening`, a call, then `separator` and a further call, then `closing`. `quote` is around strings."""

    opening: str
    quote: str
    separator: str
    closing: str

    @classmethod
    def of(cls, probe: TemplateProbe, tags: ThinkTags | None) -> "GemmaFormat | None":
        """Find the format of a template. Returns None if it doesn't write calls in this notation."""
        found = around_arguments(probe, tags)
        if found is None:
            return None
        (opening, after_name, before, between, _, end), typed, more = found
        quote = before.removeprefix(":")
        tail = f"{quote}}}"
        if (after_name, typed[2], typed[3], between) != ("{", ":", ",", f"{quote},") or not quote:
            return None
        closing = end.partition(probe.turn_end)[0] if probe.turn_end else end
        return cls(opening.lstrip(), quote, more[5].removeprefix(tail), closing.removeprefix(tail).rstrip())


class GemmaGrammar:
    """Implements AnswerGrammar."""

    def __init__(
        self,
        format: GemmaFormat,
        openings: tuple[str, ...],
        closings: tuple[str, ...],
        added: Mapping[str, int],
    ) -> None:
        """As TagGrammar has it."""
        self._format = format
        self._openings = openings
        self._closings = closings
        self._texts = LarkTexts(added)

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        return f"start: {self._thought} {self._calls(parallel)}\n{self._rules(tools)}"

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        answer = json.dumps(json_of(schema, schema, (*self._openings, *self._closings)))
        start = f"start: {self._thought} ({self._calls(parallel)} | answer)\nanswer: %json {answer}\n"
        return start + self._rules(tools)

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        text, opening = self._texts.until(self._format.opening, self._openings)
        rest, _ = self._texts.until("", self._openings)
        often = "*" if parallel else "?"
        calls = self._calls(parallel, opening)
        start = f"start: {self._thought} (BEFORE {calls}){often} REST\n"
        return f"{start}BEFORE: {text}\nREST: {rest}\n{self._rules(tools)}"

    def unenforceable(self, schema: Any) -> str | None:
        try:
            self._object("arguments", schema, _Root(schema, "definition", {}), strict=True)
        except Unenforceable as error:
            return str(error)
        return None

    @property
    def _thought(self) -> str:
        return "thought?" if self._texts.knows(_THOUGHT, _THOUGHT_END) else ""

    def _calls(self, parallel: bool, opening: str | None = None) -> str:
        opening = self._texts.literal(self._format.opening) if opening is None else opening
        more = f"({self._texts.literal(self._format.separator)} call)*" if parallel else ""
        return f"{opening} call {more} {self._texts.literal(self._format.closing)}"

    def _rules(self, tools: Sequence[CallableTool]) -> str:
        text, quote = self._texts.until(self._format.quote, self._closings)
        rules = [
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
            f"string: {self._texts.literal(self._format.quote)} STRING {quote}\nSTRING: {text} & {_READABLE}",
            _ANYTHING,
        ]
        if self._thought:
            thought, end = self._texts.until(_THOUGHT_END, (_THOUGHT_END,))
            rules.append(
                f"thought: {self._texts.literal(_THOUGHT + 'thought')} THOUGHT {end}\nTHOUGHT: {thought}"
            )
        for number, tool in enumerate(tools):
            rules.append(f"call{number}: {json.dumps(tool.name)} arguments{number}")
            rules += self._value_or_any(
                f"arguments{number}",
                tool.schema,
                _Root(tool.schema, f"definition{number}", {}),
                is_object=True,
            )
        return "\n".join(rules) + "\n"

    def _value_or_any(self, rule: str, schema: Any, root: _Root, *, is_object: bool = False) -> list[str]:
        known = dict(root.rules)
        try:
            if is_object:
                return self._object(rule, schema, root, strict=False)
            return self._value(rule, schema, root)
        except Unenforceable:
            root.rules.clear()
            root.rules.update(known)
            return [f'{rule}: "{{" (pair ("," pair)*)? "}}"' if is_object else f"{rule}: anything"]

    def _value(self, rule: str, schema: Any, root: _Root) -> list[str]:
        """Return rules for the values of a schema. Raises Unenforceable."""
        types = types_of(schema, root.schema)
        if schema is True or (isinstance(schema, dict) and not schema.keys() - ANNOTATIONS):
            return [f"{rule}: anything"]
        if not types:
            raise Unenforceable("a property has a schema that the model's notation can't be held to")
        if set(types) <= {"string", "null"} and "string" in types:
            return self._string(rule, schema, root)
        if not set(types) & {"string", "object", "array"}:
            return [f"{rule}: %json {json.dumps(json_of(schema, root.schema, self._closings))}"]
        if "$ref" in schema and not schema.keys() - ANNOTATIONS - {"$ref"}:
            return self._definition(rule, schema["$ref"], root)
        parts = alternatives_of(schema)
        if parts and not schema.keys() - ANNOTATIONS - {"anyOf", "oneOf", "allOf"}:
            return self._alternatives(rule, parts, root, disjoint="oneOf" in schema)
        if len(types) > 1 and choices_of(schema) is None:
            return self._alternatives(rule, [{**schema, "type": kind} for kind in types], root)
        if types == ("array",):
            return self._array(rule, schema, root)
        if types == ("object",):
            return self._object(rule, schema, root, strict=True)
        raise Unenforceable("an enum has values of which some are text, or are no scalars")

    def _definition(self, rule: str, reference: str, root: _Root) -> list[str]:
        """Return a rule for a reference, and those of what it refers to if they aren't made yet."""
        if reference in root.rules:
            return [f"{rule}: {root.rules[reference]}"]
        name = root.rules[reference] = f"{root.name}_{len(root.rules)}"
        return [f"{rule}: {name}", *self._value(name, target_of(reference, root.schema), root)]

    def _alternatives(self, rule: str, parts: list[Any], root: _Root, *, disjoint: bool = False) -> list[str]:
        kinds = [kind for part in parts for kind in types_of(part, root.schema)]
        if disjoint and len(kinds) > len(set(kinds)):
            raise Unenforceable("a oneOf has several schemas of one type")
        rules = [self._value(f"{rule}_{at}", part, root) for at, part in enumerate(parts)]
        names = " | ".join(f"{rule}_{at}" for at in range(len(parts)))
        return [f"{rule}: {names}", *(line for lines in rules for line in lines)]

    def _string(self, rule: str, schema: Any, root: _Root) -> list[str]:
        text, quote = text_of(schema, root.schema), self._format.quote
        null = ['"null"'] if text.null else []
        head = self._texts.literal(quote)
        if text.choices is not None:
            if any(mark in choice for choice in text.choices for mark in (*self._closings, "\x01", "\x02")):
                raise Unenforceable("a text of an enum has a mark of the model's notation of calls")
            values = [f"{head} {self._texts.exactly(choice, quote)}" for choice in text.choices]
            return [f"{rule}: " + " | ".join([*values, *null])]
        if (text.least, text.most) == (0, None):
            return [f"{rule}: " + " | ".join(["string", *null])]
        terminal, end = self._texts.until(quote, self._closings, text.least, text.most)
        values = [f"{head} {rule.upper()} {end}", *null]
        return [f"{rule}: " + " | ".join(values), f"{rule.upper()}: {terminal} & {_READABLE}"]

    def _array(self, rule: str, schema: Any, root: _Root) -> list[str]:
        if schema.keys() - ANNOTATIONS - {"type", "items", "minItems", "maxItems"}:
            raise Unenforceable("an array may have items and bounds of their number, and nothing else")
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return [f'{rule}: "[]"']
        count = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        items = f'{rule}_item ("," {rule}_item){count}'
        body = items if least else f"({items})?"
        return [
            f'{rule}: "[" {body} "]"',
            *self._value(f"{rule}_item", schema.get("items", True), root),
        ]

    def _object(self, rule: str, schema: Any, root: _Root, *, strict: bool) -> list[str]:
        """`strict`: a property that can't be enforced is an error, and else any value."""
        properties = properties_of(schema)
        if properties is None:
            return [f'{rule}: "{{" (pair ("," pair)*)? "}}"']
        if not all(map(_NAME.fullmatch, properties)):
            raise Unenforceable("the model's notation of calls has no room for such names of properties")
        value = self._value if strict else self._value_or_any
        required, rules, firsts = set(schema.get("required", ())), [], []
        may_be_empty = True
        for at, (name, own) in enumerate(properties.items()):
            pair = f"{json.dumps(name + ':')} {rule}_{at}"
            rules += value(f"{rule}_{at}", own, root)
            if may_be_empty:
                firsts.append(f"{pair} {rule}_after{at}")
            if at:
                optional = "" if name in required else "?"
                rules.append(f'{rule}_after{at - 1}: ("," {pair}){optional} {rule}_after{at}')
            may_be_empty &= name not in required
        if properties:
            rules.append(f'{rule}_after{len(properties) - 1}: ""')
        body = f"({' | '.join(firsts)}){'?' * may_be_empty}" if firsts else ""
        return [f'{rule}: "{{" {body} "}}"', *rules]
