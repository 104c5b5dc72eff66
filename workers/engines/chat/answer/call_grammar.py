"""Writes the grammar of an answer with calls, in llguidance's Lark syntax."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from workers.engines.chat.answer.call_format import CallFormat, ObjectSyntax

ID = r"/[a-zA-Z0-9]{9}/"
NUMBER = r"/[0-9]{1,3}/"
ANY = r"/(.|\n)*/"


class CallableTool(NamedTuple):
    """A tool that may be called. `schema`: of its arguments, as llguidance takes it."""

    name: str
    schema: Any


class CallGrammar:
    """Writes grammars for one format."""

    def __init__(self, format: CallFormat, added: Mapping[str, int]) -> None:
        """`added`: the ids of the tokenizer's added tokens by their text. A text in a grammar can't hold them."""
        self._format = format
        self._added = added
        texts = sorted(added, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        """Return the grammar of an answer that consists of calls of `tools`, at least one."""
        return f"start: {self._calls(self._format.opening, parallel)}\n{self._rules(tools)}"

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        """Return the grammar of an answer that consists of calls, or is JSON of a schema."""
        calls = self._calls(self._format.opening, parallel)
        return f"start: {calls} | answer\nanswer: %json {json.dumps(schema)}\n{self._rules(tools)}"

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        """Return the grammar of an answer that may be any text, in which what looks like a call is right."""
        rules = self._rules(tools)
        if self._format.at_start:
            other = r"OTHER: /[^\s{](.|\n)*/"
            return f"start: {self._calls('', parallel)} | OTHER\n{other}\n{rules}"
        first = self._format.marker
        calls = self._calls(self._format.opening.removeprefix(first), parallel)
        often = "*" if parallel else "?"
        if first in self._added:
            # tokens are no text: a call begins with its token, and nowhere else
            start = f"start: TEXT ({self._token(first)} {calls} TEXT){often}\nTEXT: {ANY}\n"
        else:
            head = f"begin[lazy]: TEXT {json.dumps(first)}\nTEXT: {ANY}\n"
            start = f"start: (begin {calls}){often} rest\nrest: TEXT\n{head}"
        return start + rules

    def _calls(self, opening: str, parallel: bool) -> str:
        separator = self._format.separator
        more = f"({self._literal(separator)} call)*" if parallel and separator is not None else ""
        return f"{self._literal(opening)} call {more} {self._literal(self._format.closing)}"

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
                id = f"{self._literal(key)} {ID} {json.dumps(chr(34))}"
            return f"{self._literal(head)} {arguments} {id} {json.dumps('}')}"
        number = f'":" {NUMBER}' if syntax.numbered else ""
        id = f"{self._literal(syntax.before_id)} {ID}" if syntax.before_id is not None else ""
        return f"{self._literal(name)} {number} {id} {self._literal(syntax.before_arguments)} {arguments}"

    def _parts(self, text: str) -> list[str]:
        """Cut a text into added tokens and what is between them."""
        parts = self._tokens.split(text) if self._tokens else [text]
        return [part for part in parts if part]

    def _literal(self, text: str) -> str:
        return " ".join(
            self._token(part) if part in self._added else json.dumps(part) for part in self._parts(text)
        )

    def _token(self, text: str) -> str:
        return f"<[{self._added[text]}]>"
