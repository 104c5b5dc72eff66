"""Compares the tokenizer's ids with the rows of the model's embedding. They often differ in number."""

from collections.abc import Iterator
from typing import Any

from workers.engines.base import EngineLoadError
from workers.engines.chat.model.loader import LoadedModel


def sampled_tokens(tokenizer: Any, rows: int) -> int:
    """Return the number of ids that may be sampled: up to the tokenizer's highest one.

    Embeddings are padded to a round number of `rows`. The rows beyond were hardly trained and have no text.
    """
    return min(rows, max(tokenizer.get_vocab().values(), default=rows - 1) + 1)


def refuse_foreign_tokenizer(loaded: LoadedModel, rows: int, end_tokens: frozenset[int]) -> None:
    """Raise EngineLoadError if the tokenizer has ids beyond the embedding's `rows` that the service needs.

    An added token that only a client would write, often one for padding, is accepted: a prompt with it is
    refused (prompt.py).
    """
    tokenizer = loaded.tokenizer
    added = tokenizer.added_tokens_decoder
    limits = f"the model's tokens are 0 to {rows - 1}"
    for text, token in tokenizer.get_vocab().items():
        if token >= rows and token not in added:
            raise EngineLoadError(
                f"the tokenizer is not the model's: it has token {token} ({text!r}); {limits}"
            )
    for text in _written_by_template(tokenizer):
        token = tokenizer.convert_tokens_to_ids(text)
        if token >= rows:
            raise EngineLoadError(f"the chat template writes {text!r}, token {token}; {limits}")
    if end_tokens and min(end_tokens) >= rows:
        raise EngineLoadError(f"answers would never end: the end token is {min(end_tokens)}; {limits}")


def _written_by_template(tokenizer: Any) -> Iterator[str]:
    """Yield the added tokens that occur in the chat template, by their text or as variables."""
    template = tokenizer.chat_template or ""
    source = "".join(template.values()) if isinstance(template, dict) else template
    names = {tokenizer.bos_token: "bos_token", tokenizer.eos_token: "eos_token"}
    for added in tokenizer.added_tokens_decoder.values():
        text = added.content
        if text in source or (text in names and names[text] in source):
            yield text
