"""Reads dialogues.txt, the training data of the demo chat model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PLACE = re.compile(r"\{(\w+)\}")
COPIED = 40
"""How often `Book.texts` has each word that a call or its result may have: so that it becomes one token."""
TOOL = re.compile(r"(\w+)\(([\w, ]+)\)")


@dataclass(frozen=True)
class Turn:
    """One exchange: questions that mean the same, and the answer to each of them."""

    questions: tuple[str, ...]
    answer: str


Dialogue = list[Turn]


@dataclass(frozen=True)
class Skill:
    """A tool, and questions that it answers.

    The names of its `parameters` are the places in the questions that they get. `results`: forms of the
    result, which the answer repeats as {result}.
    """

    name: str
    parameters: tuple[str, ...]
    description: str
    questions: tuple[str, ...]
    results: tuple[str, ...]
    answer: str


@dataclass
class Book:
    """The content of the dialogues file."""

    dialogues: list[Dialogue] = field(default_factory=list)
    skills: list[Skill] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    words: dict[str, list[str]] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Yield every text of the file, with places as they are, an answer as often as its questions."""
        for dialogue in self.dialogues:
            for turn in dialogue:
                for question in turn.questions:
                    yield from (question, turn.answer)
        yield from self.systems
        for words in self.words.values():
            # With the space before them and repeated, so that each becomes one token: the model has to learn
            # to repeat a name, not to spell it.
            yield from [f" {word}" for word in words] * 5
        for skill in self.skills:
            yield from (*skill.questions, *skill.results, *[skill.answer] * len(skill.questions))
            arguments = ", ".join(f'"{name}": ' for name in skill.parameters)
            yield from [f'{skill.name}{{"name": "{skill.name}", "arguments": {{{arguments}}}}}'] * COPIED
        for word in self.words["city"] + self.words["weather"]:
            yield from [f'{word} {word}: "{word}"}}}}'] * COPIED


def read_book(path: Path) -> Book:
    """Parse the dialogues file; its first lines explain the format. Raises ValueError for any other line."""
    book = Book()
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in re.split(r"\n{2,}", text.strip()):
        # An indented line continues the line before it.
        lines = re.split(r"\n(?!  )", block)
        lines = [line.replace("\n  ", "\n") for line in lines]
        if lines[0].startswith("U: "):
            book.dialogues.append(_read_dialogue(lines))
            continue
        if lines[0].startswith("T: "):
            book.skills.append(_read_skill(lines))
            continue
        for line in lines:
            if line.startswith("S: "):
                book.systems.append(line[3:])
            elif match := re.fullmatch(r"\[(\w+)\] (.+)", line):
                book.words[match[1]] = match[2].split(" | ")
            else:
                raise ValueError(f"{path.name}: not a line of the format: {line!r}")
    return book


def _read_dialogue(lines: list[str]) -> Dialogue:
    dialogue: Dialogue = []
    questions: list[str] = []
    for line in lines:
        mark, text = line[:3], line[3:]
        if mark == "U: ":
            questions.append(text)
        elif mark == "A: " and questions:
            dialogue.append(Turn(tuple(questions), text))
            questions = []
        else:
            raise ValueError(f"not a line of a dialogue: {line!r}")
    if questions:
        raise ValueError(f"no answer to {questions[0]!r}")
    return dialogue


def _read_skill(lines: list[str]) -> Skill:
    texts: dict[str, list[str]] = {mark: [] for mark in "TDURA"}
    for line in lines:
        if line[1:3] != ": " or line[0] not in texts:
            raise ValueError(f"not a line of a dialogue with a tool: {line!r}")
        texts[line[0]].append(line[3:])
    head = TOOL.fullmatch(texts["T"][0])
    if head is None or not (len(texts["D"]) == len(texts["A"]) == 1 and texts["U"] and texts["R"]):
        raise ValueError(f"a description, questions, results and an answer must follow {lines[0]!r}")
    return Skill(
        name=head[1],
        parameters=tuple(head[2].split(", ")),
        description=texts["D"][0],
        questions=tuple(texts["U"]),
        results=tuple(texts["R"]),
        answer=texts["A"][0],
    )
