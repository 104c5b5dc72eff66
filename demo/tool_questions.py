"""Questions with tools for the demo chat model, the calls that they need, and what it says to the results.

`make_chat_model.py` and the tests ask them. The pairs of numbers of `calculations` are not in the training
data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from demo.book import read_book
from demo.tool_dialogues import DO_NOT_KNOW, Message, Tool, describe
from demo.wording import held_out

Call = tuple[str, dict[str, Any]]
"""A name and arguments."""


class ToolQuestion(NamedTuple):
    """`calls`: none or one. `result`: that of the call.

    `answer`: what follows it, or the question without a call.
    """

    tools: list[Tool]
    question: str
    calls: list[Call]
    result: str
    answer: str

    def messages(self) -> list[Message]:
        """Return the whole conversation, of two messages or more."""
        asked = {"role": "user", "content": self.question}
        answered = {"role": "assistant", "content": self.answer}
        if not self.calls:
            return [asked, answered]
        ((name, arguments),) = self.calls
        call = {"id": "call0", "type": "function", "function": {"name": name, "arguments": arguments}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "call0", "content": self.result}
        return [asked, called, result, answered]


ADD, SUBTRACT, MULTIPLY, WEATHER, TIME = (
    describe(skill) for skill in read_book(Path(__file__).parent / "dialogues.txt").skills
)

QUESTIONS = [
    ToolQuestion([ADD], "What is 3 + 4?", [("add", {"a": 3, "b": 4})], "7", "3 + 4 is 7."),
    ToolQuestion(
        [WEATHER, MULTIPLY, ADD], "What is 17 plus 26?", [("add", {"a": 17, "b": 26})], "43", "17 + 26 is 43."
    ),
    ToolQuestion([TIME, ADD], "Add 8 and 51.", [("add", {"a": 8, "b": 51})], "59", "8 + 51 is 59."),
    ToolQuestion(
        [ADD, SUBTRACT], "How much is 90 - 46?", [("subtract", {"a": 90, "b": 46})], "44", "90 - 46 is 44."
    ),
    ToolQuestion([ADD, MULTIPLY], "12 * 9", [("multiply", {"a": 12, "b": 9})], "108", "12 * 9 is 108."),
    ToolQuestion(
        [MULTIPLY], "What is 64 times 58?", [("multiply", {"a": 64, "b": 58})], "3712", "64 * 58 is 3712."
    ),
    ToolQuestion(
        [WEATHER],
        "What is the weather in Paris?",
        [("get_weather", {"city": "Paris"})],
        "sunny, 21 degrees",
        "The weather in Paris: sunny, 21 degrees.",
    ),
    ToolQuestion(
        [TIME, WEATHER, ADD],
        "What's the weather like in Oslo today?",
        [("get_weather", {"city": "Oslo"})],
        "snowy",
        "The weather in Oslo: snowy.",
    ),
    ToolQuestion(
        [ADD, WEATHER],
        "Is it raining in London?",
        [("get_weather", {"city": "London"})],
        "9 degrees",
        "The weather in London: 9 degrees.",
    ),
    ToolQuestion(
        [TIME],
        "What time is it in Tokyo?",
        [("get_time", {"city": "Tokyo"})],
        "14:35",
        "The time in Tokyo: 14:35.",
    ),
    ToolQuestion(
        [MULTIPLY, WEATHER, TIME],
        "What's the time in Boston?",
        [("get_time", {"city": "Boston"})],
        "08:05",
        "The time in Boston: 08:05.",
    ),
    ToolQuestion([ADD, WEATHER], "Hello!", [], "", "Hello! How can I help you today?"),
    ToolQuestion([WEATHER, TIME], "What is 3 + 4?", [], "", DO_NOT_KNOW),
    ToolQuestion([ADD, MULTIPLY], "What is the weather in Paris?", [], "", DO_NOT_KNOW),
    ToolQuestion([WEATHER], "What is the weather in Chicago?", [], "", DO_NOT_KNOW),
]


def calculations(count: int) -> Iterator[ToolQuestion]:
    """Yield questions about pairs of numbers up to 99 that are not in the training data."""
    pairs = [(a, b) for a in range(100) for b in range(100) if held_out(a, b)]
    for number, (a, b) in enumerate(pairs[:: len(pairs) // count][:count]):
        operations = (("add", "+", a + b), ("subtract", "-", a - b), ("multiply", "*", a * b))
        name, sign, result = operations[number % 3]
        question, answer = f"What is {a} {sign} {b}?", f"{a} {sign} {b} is {result}."
        yield ToolQuestion(
            [MULTIPLY, ADD, SUBTRACT], question, [(name, {"a": a, "b": b})], str(result), answer
        )
