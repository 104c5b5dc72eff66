"""Prompts for a model whose language is unknown: texts of its own tokens."""

import random
from typing import Any

MOST_TOKENS = 4000
"""The number of different tokens that prompts are made of."""


class Texts:
    """Random tokens of one tokenizer, the same in each run."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(0)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids = sorted(set(tokenizer.get_vocab().values()) - special)
        sample = self._random.sample(ids, min(len(ids), MOST_TOKENS))
        # a byte that is no character would be encoded as several tokens
        self._ids = [token for token in sample if _is_plain(tokenizer.decode([token]))]

    def tokens(self, count: int) -> list[int]:
        """Return so many token ids."""
        return self._random.choices(self._ids, k=count)

    def content(self, tokens: int) -> str:
        """Return the content of a message of about so many tokens."""
        content: str = self._tokenizer.decode(self.tokens(tokens))
        return content

    def prompt(self, content: str) -> list[int]:
        """Return the tokens of a chat with one message, as the model gets them."""
        messages = [{"role": "user", "content": content}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text.strip())
