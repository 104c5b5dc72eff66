"""Composes the conversations that the demo chat model is trained with."""

import math
import random
from typing import NamedTuple

from demo.book import PLACE, Book, Dialogue
from demo.tool_dialogues import Message, Tool, ToolDialogues, describe
from demo.wording import Wording

TOOLS_SHARE = 0.7
"""Of the conversations."""


class Conversation(NamedTuple):
    """`tools`: those of the request, as chat templates get them."""

    messages: list[Message]
    tools: list[Tool]


class Writer:
    """Composes conversations from the book, with varying order, wording, system message and tools."""

    def __init__(self, book: Book, seed: int) -> None:
        self._book = book
        self._random = random.Random(seed)
        self._wording = Wording(book, self._random)
        self._weights = [self._weight(dialogue) for dialogue in book.dialogues]
        self._tools = ToolDialogues(book, self._wording, self._random)

    def conversation(self) -> Conversation:
        """Return a conversation of one to four dialogues, some with a system message and some with tools."""
        messages: list[Message] = []
        asked: set[str] = set()
        if self._random.random() < 0.5:
            messages.append({"role": "system", "content": self._system()})
        offered = self._tools.choose() if self._random.random() < TOOLS_SHARE else []
        for _ in range(self._random.choice((1, 1, 2, 2, 3, 4))):
            about_tools = self._random.random() < (0.7 if offered else 0.1)
            messages += self._tools.dialogue(offered) if about_tools else self._dialogue(asked)
        return Conversation(messages, [describe(skill) for skill in offered])

    def _weight(self, dialogue: Dialogue) -> float:
        """Return the sampling weight of a dialogue, which grows with its number of wordings."""
        wordings = 0
        for question in dialogue[0].questions:
            places = PLACE.findall(question)
            wordings += max((len(self._book.words.get(place, "")) for place in places), default=1) or 1
        return min(math.sqrt(wordings), 14)

    def _system(self) -> str:
        count = self._random.choice((1, 1, 1, 2, 3))
        return " ".join(
            self._wording.fill(text, {}) for text in self._random.sample(self._book.systems, count)
        )

    def _dialogue(self, asked: set[str]) -> list[Message]:
        """Return one dialogue and add its questions to `asked`; nothing if one of them was asked already.

        The answer to "What is my name?" depends on what was said before, so a conversation may have only one
        of the dialogues with this question.
        """
        dialogue = self._random.choices(self._book.dialogues, self._weights)[0]
        questions = {question for turn in dialogue for question in turn.questions}
        if questions & asked:
            return []
        asked |= questions
        messages: list[Message] = []
        # One name for the whole dialogue, because a later turn asks for the name given in an earlier one.
        filled = {"name": self._random.choice(self._book.words["name"])}
        for number, turn in enumerate(dialogue):
            if number and self._random.random() < 0.3:
                messages += self._dialogue(asked)
            question = self._wording.fill(self._wording.reword(self._random.choice(turn.questions)), filled)
            messages.append({"role": "user", "content": question})
            if self._random.random() < 0.03:
                messages.append({"role": "tool", "content": self._wording.fill("{number}", {})})
            messages.append({"role": "assistant", "content": self._wording.fill(turn.answer, filled)})
        return messages
