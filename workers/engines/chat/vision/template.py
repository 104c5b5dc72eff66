"""Makes a tokenizer's chat template fit for messages with images, and for messages that are text alone."""

from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin

from workers.engines.base import EngineLoadError

SENTINEL = "sentinel"
RENDER_ERRORS = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)

TEXTS_AS_PARTS = (
    "{%- set texts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set part = {'type': 'text', 'text': message['content']} -%}"
    "{%- set message = dict(message, content=[part]) -%}"
    "{%- endif -%}"
    "{%- set texts.messages = texts.messages + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = texts.messages -%}"
)
"""Put before a template that writes nothing of a content that is a string, as those of SmolVLM."""


def adopt_template(tokenizer: Any, weights: str, source: dict[str, Any]) -> None:
    """Give a tokenizer the processor's template if it has none of its own, and let it take texts.

    `source`: arguments of `from_pretrained`.
    """
    if not tokenizer.chat_template:
        options, _ = ProcessorMixin.get_processor_dict(weights, **source)
        tokenizer.chat_template = options.get("chat_template")
    template = tokenizer.chat_template
    part = {"type": "text", "text": SENTINEL}
    if not isinstance(template, str) or _writes(tokenizer, SENTINEL, SENTINEL):
        return
    if _writes(tokenizer, [part], SENTINEL):
        tokenizer.chat_template = TEXTS_AS_PARTS + template


def refuse_without_images(tokenizer: Any, placeholder: str) -> None:
    """Raise EngineLoadError unless the chat template writes the placeholder of an image."""
    parts = [{"type": "image"}, {"type": "text", "text": SENTINEL}]
    if not _writes(tokenizer, parts, placeholder):
        raise EngineLoadError(f"the chat template doesn't write {placeholder} for an image")


def _writes(tokenizer: Any, content: Any, text: str) -> bool:
    try:
        written: str = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except RENDER_ERRORS:
        return False
    return text in written
