"""Words for the conversations of the demo chat model: what places stand for, noise, and how users type."""

import random
import re

from demo.book import PLACE, Book


def held_out(a: int, b: int) -> bool:
    """Whether a pair of numbers is kept out of all questions, to see whether the model has learnt to copy."""
    return (a + 3 * b) % 8 == 0


class Wording:
    """Fills texts of the book with words. All that is drawn depends on `chance` alone."""

    def __init__(self, book: Book, chance: random.Random) -> None:
        self._words = book.words
        self._random = chance
        self._vocabulary = sorted({word for text in book.texts() for word in re.findall(r"\w+", text)})

    def fill(self, text: str, filled: dict[str, str]) -> str:
        """Replace each `{word}` by its entry in `filled`, or else by one of the book's words."""
        made = {"noise": self.noise, "number": self._number, "clock": self._clock}

        def word(match: re.Match[str]) -> str:
            key = match[1].lower()
            if key in filled:
                return filled[key]
            return made[key]() if key in made else self._random.choice(self._words[key])

        return PLACE.sub(word, text)

    def pair(self) -> tuple[int, int]:
        """Return two numbers of up to three digits that are not held out."""
        while held_out(a := self._operand(), b := self._operand()):
            pass
        return a, b

    def _operand(self) -> int:
        return self._random.randrange(self._random.choice((10, 100, 100, 100, 1000)))

    def _number(self) -> str:
        """Return a number of one to four digits."""
        return str(self._random.randrange(10 ** self._random.choice((1, 2, 2, 3, 4))))

    def _clock(self) -> str:
        return f"{self._random.randint(0, 23):02d}:{self._random.randint(0, 59):02d}"

    def noise(self) -> str:
        """Return text without meaning: letters, digits, one word repeated, or random words of the book."""
        chance = self._random
        kind = chance.random()
        if kind < 0.3:
            letters = "abcdefghijklmnopqrstuvwxyz" if kind < 0.2 else "0123456789-+.?"
            words = ["".join(chance.choices(letters, k=chance.randint(1, 8))) for _ in range(3)]
            return " ".join(words[: chance.randint(1, 3)])
        if kind < 0.4:
            return chance.choice("🚀🌍🐱🎉你是我中文éüß!?.,xyz") * chance.choice((1, 2, 3, 100))
        count = int(chance.paretovariate(0.7)) + 1
        if kind < 0.6:
            return " ".join([chance.choice(self._vocabulary)] * min(count, 80))
        return " ".join(chance.choices(self._vocabulary, k=min(count, 80)))

    def reword(self, question: str) -> str:
        """Vary the question as users type it: other case, other punctuation, a missing letter."""
        kind = self._random.random()
        if kind < 0.10:
            return question.lower()
        if kind < 0.20:
            return question.rstrip(".?!")
        if kind < 0.25:
            return question.rstrip(".?!") + self._random.choice((".", "!", "?", "??", " ", "\n"))
        if kind < 0.30:
            return question.upper()
        if kind < 0.34 and len(question) > 12 and "{" not in question:
            place = self._random.randrange(len(question))
            return question[:place] + question[place + 1 :]
        return question
