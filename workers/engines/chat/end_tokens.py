"""Finds the tokens that end an answer."""

from typing import Any

from jinja2 import TemplateError


def end_tokens(generation: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, from all places that may name one.

    Fine-tunes often change one of these places only. Where a file names none, transformers fills in a number
    of the architecture, which may be an ordinary word here: what comes from the config must therefore be a
    special token.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    named = _ids(generation)
    of_config = _ids(config)
    if getattr(generation, "_from_model_config", False):
        of_config, named = of_config | named, set()
    own = tokenizer.eos_token_id
    named |= set() if own is None else {own}
    return frozenset(named | ((of_config | _turn_end(tokenizer)) & special))


def _ids(config: Any) -> set[int]:
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else set(eos)


def _turn_end(tokenizer: Any) -> set[int]:
    """Return the token that the chat template writes after an assistant's message."""
    answer = "sentinel"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return set()  # a template that wants other messages tells nothing
    _, found, rest = text.rpartition(answer)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return set(ids[:1])
