"""Dialogues in which the demo chat model calls tools.

Pairs of numbers and results are drawn so widely that the model has to copy them: it can't know them by heart.
"""

import json
import random
from typing import Any

from demo.book import Book, Skill
from demo.wording import Wording

Message = dict[str, Any]
Tool = dict[str, Any]

DO_NOT_KNOW = "I am sorry, I do not know that. I am only a small demo model."
OFFERED_SHARE = 0.7
"""Of the questions for a tool, those whose tool the request has."""
UNKNOWN_SHARE = 0.15
"""Of the questions about cities, those about one that the model does not know."""


class ToolDialogues:
    """Composes the tools of a request, and dialogues that need one of the book's tools."""

    def __init__(self, book: Book, wording: Wording, chance: random.Random) -> None:
        self._skills = book.skills
        self._wording = wording
        self._random = chance

    def choose(self) -> list[Skill]:
        """Return one to three of the book's tools in any order."""
        return self._random.sample(self._skills, self._random.randint(1, 3))

    def dialogue(self, offered: list[Skill]) -> list[Message]:
        """Return a question, then the call, its result and the answer; or that the model does not know it."""
        chance = self._random
        others = [skill for skill in self._skills if skill not in offered]
        able = bool(offered) and chance.random() < OFFERED_SHARE
        skill = chance.choice(offered if able else others)
        a, b = self._wording.pair()
        filled = {"a": str(a), "b": str(b), "city": self._wording.fill("{city}", {})}
        if "city" in skill.parameters and chance.random() < UNKNOWN_SHARE:
            filled["city"] = self._wording.fill("{place}", {})
            able = False
        question = self._wording.fill(self._wording.reword(chance.choice(skill.questions)), filled)
        asked = {"role": "user", "content": question}
        if not able:
            return [asked, {"role": "assistant", "content": DO_NOT_KNOW}]
        arguments = {
            name: filled[name] if name == "city" else json.loads(filled[name]) for name in skill.parameters
        }
        call = {"type": "function", "function": {"name": skill.name, "arguments": arguments}}
        result = self._wording.fill(chance.choice(skill.results), {})
        answer = self._wording.fill(skill.answer, {**filled, "result": result})
        return [
            asked,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": answer},
        ]


def describe(skill: Skill) -> Tool:
    """Return the tool as requests describe it."""
    properties = {name: {"type": "string" if name == "city" else "number"} for name in skill.parameters}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(skill.parameters),
        "additionalProperties": False,
    }
    function = {"name": skill.name, "description": skill.description, "parameters": parameters}
    return {"type": "function", "function": function}
