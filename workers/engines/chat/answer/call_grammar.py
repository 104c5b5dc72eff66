"""Writes the grammar of an answer with calls, in llguidance's Lark syntax."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from workers.engines.chat.answer.call_format import CallFormat, ObjectSyntax
from workers.engines.chat.answer.lark import LarkTexts

ID = r"/[a-zA-Z0-9]{9}/"
NUMBER = r"/[0-9]{1,3}/"
ANY = r"/(.|\n)*/"


class CallableTool(NamedTuple):
    """A tool that may be called. `schema`: of its arguments, as llguidance takes it."""

    name: str
    schema: Any


class AnswerGrammar(Protocol):
    """Writes grammars for one notation of calls."""

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        """Return the grammar of an answer that consists of calls of `tools`, at least one."""

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        """Return the grammar of an answer that consists of calls, or is JSON of a schema."""

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        """Return the grammar of an answer that may be any text, in which what looks like a call is right."""

    def unenforceable(self, schema: Any) -> str | None:
        """Return, for the client, what of a tool's schema the notation can't express; None: nothing.

        The grammars allow more where it isn't asked.
        """


class CallGrammar:
    """Implements AnswerGrammar for calls whose arguments are JSON."""

    def __init__(self, format: CallFormat, added: Mapping[str, int]) -> None:
        """`added`: as LarkTexts has it."""
        self._format = format
        self._texts = LarkTexts(added)

    def unenforceable(self, schema: Any) -> str | None:
        return None

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        return f"start: {self._calls(self._format.opening, parallel)}\n{self._rules(tools)}"

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        calls = self._calls(self._format.opening, parallel)
        return f"start: {calls} | answer\nanswer: %json {json.dumps(schema)}\n{self._rules(tools)}"

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        rules = self._rules(tools)
        if self._format.at_start:
            other = r"OTHER: /[^\s{](.|\n)*/"
            return f"start: {self._calls('', parallel)} | OTHER\n{other}\n{rules}"
        first = self._format.marker
        calls = self._calls(self._format.opening.removeprefix(first), parallel)
        often = "*" if parallel else "?"
        if self._texts.knows(first):
            # tokens are no text: a call begins with its token, and nowhere else
            start = f"start: TEXT ({self._texts.token(first)} {calls} TEXT){often}\nTEXT: {ANY}\n"
        else:
            head = f"begin[lazy]: TEXT {json.dumps(first)}\nTEXT: {ANY}\n"
            start = f"start: (begin {calls}){often} rest\nrest: TEXT\n{head}"
        return start + rules

    def _calls(self, opening: str, parallel: bool) -> str:
        separator = self._format.separator
        more = f"({self._texts.literal(separator)} call)*" if parallel and separator is not None else ""
        return f"{self._texts.literal(opening)} call {more} {self._texts.literal(self._format.closing)}"

    def _rules(self, tools: Sequence[CallableTool]) -> str:
        rules = ["call: " + " | ".join(f"call{number}" for number in range(len(tools)))]
        for number, tool in enumerate(tools):
            rules.append(f"call{number}: {self._call(tool.name, f'arguments{number}')}")
            rules.append(f"arguments{number}: %json {json.dumps(tool.schema)}")
        return "\n".join(rules) + "\n"

    def _call(self, name: str, arguments: str) -> str:
        syntax = self._format.syntax
        if isinstance(syntax, ObjectSyntax):
            keys = json.dumps(syntax.name_key), json.dumps(syntax.arguments_key)
            head = f'{{{keys[0]}: "{name}", {keys[1]}: '
            id = ""
            if syntax.id_key is not None:
                key = f', {json.dumps(syntax.id_key)}: "'
                id = f"{self._texts.literal(key)} {ID} {json.dumps(chr(34))}"
            return f"{self._texts.literal(head)} {arguments} {id} {json.dumps('}')}"
        number = f'":" {NUMBER}' if syntax.numbered else ""
        id = f"{self._texts.literal(syntax.before_id)} {ID}" if syntax.before_id is not None else ""
        return f"{self._texts.literal(name)} {number} {id} {self._texts.literal(syntax.before_arguments)} {arguments}"
