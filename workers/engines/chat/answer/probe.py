"""Renders a chat template with messages whose texts are known, to see what it writes around them."""

import re
from typing import Any

from jinja2 import TemplateError

_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_KEY = re.compile(r"\.(\w+)|['\"](\w+)['\"]")
_NAME = re.compile(r"(?<![.\w])\w+")

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
        """Return the text of a question and an assistant's message. None if the template refuses the message."""
        return self._render([QUESTION, answer])

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str | None:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except ERRORS:
            return None
        return text
