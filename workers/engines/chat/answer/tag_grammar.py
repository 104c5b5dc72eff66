"""Writes the grammar of an answer whose calls have a tag for each argument, in llguidance's Lark syntax."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from workers.engines.chat.answer.argument_values import (
    Text,
    Unenforceable,
    json_of,
    properties_of,
    text_of,
    types_of,
)
from workers.engines.chat.answer.call_grammar import CallableTool
from workers.engines.chat.answer.lark import LarkTexts
from workers.engines.chat.answer.tag_format import TagFormat

_KEY = re.compile(r"[\w.$-]+")
"""Names that can be written into a tag."""


class TagGrammar:
    """Implements AnswerGrammar."""

    def __init__(
        self,
        format: TagFormat,
        openings: tuple[str, ...],
        closings: tuple[str, ...],
        added: Mapping[str, int],
    ) -> None:
        """`openings`: what shows a parser that a call begins. `closings`: at which it ends a value or a call.

        `added`: as LarkTexts has it.
        """
        self._format = format
        self._openings = openings
        self._closings = closings
        self._texts = LarkTexts(added)

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        opening = self._texts.literal(self._format.opening)
        return f"start: {opening} {self._calls(parallel)}\n{self._rules(tools)}"

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        calls = f"{self._texts.literal(self._format.opening)} {self._calls(parallel)}"
        return f"start: {calls} | answer\nanswer: %json {json.dumps(schema)}\n{self._rules(tools)}"

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        text, opening = self._texts.until(self._format.opening, self._openings)
        rest, _ = self._texts.until("", self._openings)
        often = "*" if parallel else "?"
        start = f"start: (BEFORE {opening} {self._calls(parallel)}){often} REST\n"
        return f"{start}BEFORE: {text}\nREST: {rest}\n{self._rules(tools)}"

    def unenforceable(self, schema: Any) -> str | None:
        try:
            for name, value in (properties_of(schema) or {}).items():
                if not _KEY.fullmatch(name):
                    raise Unenforceable(
                        "the model's notation of calls has no room for such names of properties"
                    )
                if "string" in types_of(value, schema) or not types_of(value, schema):
                    self._check(text_of(value, schema))
        except Unenforceable as error:
            return str(error)
        return None

    def _check(self, text: Text) -> None:
        if any(closing in choice for choice in text.choices or () for closing in self._closings):
            raise Unenforceable("a text of an enum has a mark of the model's notation of calls")

    def _calls(self, parallel: bool) -> str:
        more = f"({self._texts.literal(self._format.separator)} call)*" if parallel else ""
        return f"call {more} {self._texts.literal(self._format.closing)}"

    def _rules(self, tools: Sequence[CallableTool]) -> str:
        text, after = self._texts.until(self._format.after_value, self._closings)
        rules = [
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
            f"text: TEXT {after}\nTEXT: {text}",
        ]
        for number, tool in enumerate(tools):
            rules += self._call(number, tool)
        return "\n".join(rules) + "\n"

    def _call(self, number: int, tool: CallableTool) -> list[str]:
        head = self._texts.literal(tool.name + self._format.after_name)
        try:
            properties = properties_of(tool.schema)
        except Unenforceable:
            properties = None
        if properties is None:
            key = f"{self._texts.literal(self._format.before_key)} /[A-Za-z0-9_.$-]{{1,64}}/"
            before = self._texts.literal(self._format.before_text)
            return [f"call{number}: {head} any{number}*\nany{number}: {key} {before} text"]
        required = tool.schema.get("required", ())
        rules, order = [], []
        for at, (name, schema) in enumerate(properties.items()):
            if not _KEY.fullmatch(name):
                continue
            rule = f"argument{number}_{at}"
            order.append(rule if name in required else f"{rule}?")
            rules += self._argument(rule, name, schema, tool.schema)
        return [f"call{number}: {head} {' '.join(order)}", *rules]

    def _argument(self, rule: str, name: str, schema: Any, root: Any) -> list[str]:
        key, after = self._format.before_key + name, self._texts.literal(self._format.after_value)
        head, json_head = (
            self._texts.literal(key + before)
            for before in (self._format.before_text, self._format.before_json)
        )
        types = types_of(schema, root)
        if types and "string" not in types:
            value = f"%json {json.dumps(json_of(schema, root, self._closings))}"
            return [f"{rule}: {json_head} {rule}_value {after}", f"{rule}_value: {value}"]
        try:
            text = text_of(schema, root)
            self._check(text)
        except Unenforceable:
            text = Text()
        values, rules = self._text_values(rule, text)
        if text.null and head != json_head:
            return [f"{rule}: {head} ({values}) | {json_head} {self._null}", *rules]
        # any text may be "null", too
        null = f" | {self._null}" if text.null and text != Text(null=True) else ""
        return [f"{rule}: {head} ({values}{null})", *rules]

    @property
    def _null(self) -> str:
        return self._texts.exactly("null", self._format.after_value)

    def _text_values(self, rule: str, text: Text) -> tuple[str, list[str]]:
        """Return the values of an argument, each with its closing, and the rules for them."""
        if text.choices is not None:
            choices = (self._texts.exactly(choice, self._format.after_value) for choice in text.choices)
            return " | ".join(choices), []
        if text == Text(null=text.null):
            return "text", []
        terminal, after = self._texts.until(self._format.after_value, self._closings, text.least, text.most)
        return f"{rule.upper()} {after}", [f"{rule.upper()}: {terminal}"]
