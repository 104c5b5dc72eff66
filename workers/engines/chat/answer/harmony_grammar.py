"""Writes the grammar of an answer in the channels of gpt-oss, in llguidance's Lark syntax."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workers.engines.chat.answer.argument_values import json_of
from workers.engines.chat.answer.call_grammar import CallableTool
from workers.engines.chat.answer.lark import LarkTexts, without

_CHANNEL, _MESSAGE, _CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
_NEXT = ("<|end|>", "<|start|>")


class HarmonyGrammar:
    """Implements AnswerGrammar. An answer has one call at most, with which the model ends its turn."""

    @classmethod
    def of(cls, closings: tuple[str, ...], added: Mapping[str, int]) -> "HarmonyGrammar | None":
        """Return None for a tokenizer without the family's control tokens.

        `closings`: texts at which a message ends. `added`: as LarkTexts has it.
        """
        texts = LarkTexts(added)
        return cls(closings, texts) if texts.knows(_CHANNEL, _MESSAGE, _CONSTRAIN, *_NEXT) else None

    def __init__(self, closings: tuple[str, ...], texts: LarkTexts) -> None:
        self._closings = closings
        self._texts = texts

    def required(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        return f"start: thought* call\n{self._rules(tools)}"

    def either(self, tools: Sequence[CallableTool], schema: Any, *, parallel: bool) -> str:
        final = self._texts.literal(f"{_CHANNEL}final{_MESSAGE}")
        answer = f"answer: %json {json.dumps(json_of(schema, schema, self._closings))}"
        return f"start: thought* (call | {final} answer)\n{answer}\n{self._rules(tools)}"

    def free(self, tools: Sequence[CallableTool], *, parallel: bool) -> str:
        head, message = self._texts.token(_CHANNEL), self._texts.token(_MESSAGE)
        last = f'last: {head} ("final" | "commentary" | "analysis") {message} TEXT'
        preamble = f'preamble: {head} "commentary" {message} TEXT {self._next}'
        return f"start: (thought | preamble)* (call | last)\n{last}\n{preamble}\n{self._rules(tools)}"

    def unenforceable(self, schema: Any) -> str | None:
        return None

    @property
    def _next(self) -> str:
        return self._texts.literal("".join(_NEXT) + "assistant")

    def _rules(self, tools: Sequence[CallableTool]) -> str:
        thought = self._texts.literal(f"{_CHANNEL}analysis{_MESSAGE}")
        rules = [
            f"thought: {thought} TEXT {self._next}",
            f"TEXT: /{without(self._closings)}/",
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
        ]
        for number, tool in enumerate(tools):
            head = f"{_CHANNEL}commentary to=functions.{tool.name} {_CONSTRAIN}json{_MESSAGE}"
            rules.append(f"call{number}: {self._texts.literal(head)} arguments{number}")
            schema = json_of(tool.schema, tool.schema, self._closings)
            rules.append(f"arguments{number}: %json {json.dumps(schema)}")
        return "\n".join(rules) + "\n"
