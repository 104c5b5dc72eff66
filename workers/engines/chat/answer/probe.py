"""Renders a chat template with messages whose texts are known, to see what it writes around them."""

import re
from typing import Any

from jinja2 import TemplateError

_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_KEY = re.compile(r"\.(\w+)|['\"](\w+)['\"]")
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")
_NAME = re.compile(r"(?<![.\w])\w+")

CONTENT = "sentinel of content"
QUESTION = {"role": "user", "content": "question"}
ERRORS = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What rendering a template raises for messages that it does not expect."""


class TemplateProbe:
    """The chat template of a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template or ""
        self.source: str = "\n".join(template.values()) if isinstance(template, dict) else template
        code = " ".join(_CODE.findall(self.source))
        self.keys = frozenset(name or quoted for name, quoted in _KEY.findall(code))
        """Names that the template reads of something, of a message for example."""
        self.variables = frozenset(_NAME.findall(_STRING.sub(" ", code)))
        """Names that are not a part of another value."""

    def conversation(self, answer: dict[str, Any]) -> str | None:
        """Return the text of a question and an assistant's message.

        None if the template refuses the message.
        """
        return self._render([QUESTION, answer])

    def answer(self, message: dict[str, Any], tools: list[dict[str, Any]]) -> str | None:
        """Return what the template writes for an assistant's message, behind the prompt for an answer.

        None if it refuses the message.
        """
        whole = self._render([QUESTION, message], tools)
        if whole is None:
            return None
        # some templates write tools before the last question only: the prompt alone doesn't show where the
        # answer begins
        others = [
            self._render([QUESTION], tools, add_generation_prompt=True),
            self._render([QUESTION, {"role": "assistant", "content": CONTENT}], tools),
        ]
        return whole[max(_common_start(whole, other) for other in others) :]

    @property
    def turn_end(self) -> str:
        """What the template writes after an assistant's message, without spaces around it."""
        text = self.conversation({"role": "assistant", "content": CONTENT}) or ""
        _, found, rest = text.rpartition(CONTENT)
        return rest.strip() if found else ""

    def shows(self, tool: dict[str, Any]) -> bool:
        """Whether the template tells the model of a tool."""
        text = self._render([QUESTION], [tool], add_generation_prompt=True)
        return text is not None and tool["function"]["name"] in text

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str | None:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except ERRORS:
            return None
        return text


def _common_start(text: str, other: str | None) -> int:
    """Return how many characters both begin with, and not a part of a tag: the next tags may begin alike."""
    if other is None:
        return 0
    size = next((at for at, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]), None)
    if size is None:
        return min(len(text), len(other))
    return len(_OPEN_TAG.sub("", text[:size]))
