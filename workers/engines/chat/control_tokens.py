"""Which of a tokenizer's tokens structure a chat, and a copy of a tokenizer that knows them by other
names."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError, nodes
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

ROLES = ("system", "user", "assistant", "tool", "function")
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What rendering a template raises if it wants other messages."""


def control_tokens(tokenizer: Any, others: Iterable[str] = ()) -> dict[str, int]:
    """Return a tokenizer's control tokens with their ids.

    These are the special tokens, and of the other added tokens those that the tokenizer's config lists as
    `chat_control_tokens`, or else those that a chat template writes and does not look for in messages: a
    template that removes earlier reasoning looks for `</think>`, which belongs to an answer's text. `others`
    are control tokens in any case.
    """
    ids = {added.content: token for token, added in tokenizer.added_tokens_decoder.items()}
    found = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    found |= ids.keys() & set(others)
    if tokenizer.chat_control_tokens is not None:
        found |= ids.keys() & tokenizer.chat_control_tokens
    else:
        templates = tokenizer.chat_template or {}
        for template in [templates] if isinstance(templates, str) else templates.values():
            # words that were added to a vocabulary are ordinary text
            marks = {token for token in ids if not token[0].isalnum() and any(map(str.isalpha, token))}
            with suppress(TemplateError):  # requests are refused with the reason
                found |= _written(tokenizer, template, marks)
    # one character can't be marked inside, and white space is ordinary text
    return {token: ids[token] for token in sorted(found) if len(token) > 1 and not token.isspace()}


def _written(tokenizer: Any, template: str, tokens: Iterable[str]) -> set[str]:
    """Return those of the tokens that a template writes and does not look for. Raises TemplateError."""
    tree = _compile_jinja_template(template).environment.parse(template)
    written = "\0".join([*_literals(tree), *_short_chats(tokenizer, template)])
    # `<think>` goes with `</think>`
    sought = "\0".join(_sought(tree)).replace("</", "<")
    return {token for token in tokens if token in written and token.replace("</", "<") not in sought}


def _literals(tree: nodes.Template) -> Iterator[str]:
    """Yield a template's own text."""
    yield from (node.data for node in tree.find_all(nodes.TemplateData))
    yield from (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))


def _sought(tree: nodes.Template) -> Iterator[str]:
    """Yield the strings that a template compares with, or passes to methods and filters as first argument."""
    operands: list[nodes.Expr] = []
    for comparison in tree.find_all(nodes.Compare):
        operands += [comparison.expr, *(operand.expr for operand in comparison.ops)]
    for call in tree.find_all(nodes.Call):
        # not of macros, whose arguments may be what they write
        if isinstance(call.node, nodes.Getattr):
            operands += call.args[:1]
    for applied in tree.find_all(nodes.Filter):
        operands += applied.args[:1]
    for operand in operands:
        if isinstance(operand, nodes.Const) and isinstance(operand.value, str):
            yield operand.value


def _short_chats(tokenizer: Any, template: str) -> Iterator[str]:
    """Yield prompts of a template, which may join a token from pieces: `'<|' + message['role'] + '|>'`."""
    messages = [{"role": role, "content": "x"} for role in ROLES]
    for chat in [*([message] for message in messages), messages[:3], messages[1:3]]:
        for prompted in (False, True):
            with suppress(*TEMPLATE_ERRORS):
                yield tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=prompted
                )


def renamed(backend: Any, names: dict[str, str]) -> Tokenizer:
    """Return a copy of a `tokenizers.Tokenizer` with other names for some of its added tokens.

    The text of a token that has a new name can't become the token anymore, by no step of the copy. The copy
    adds no special tokens of its own.
    """
    described = json.loads(backend.to_str())
    described["post_processor"] = None
    for added in described["added_tokens"]:
        if added["content"] in names:
            added |= {"content": names[added["content"]], "single_word": False}
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        gone = names.keys()
        model["merges"] = [pair for pair in model["merges"] if gone.isdisjoint({*pair, "".join(pair)})]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    copy: Tokenizer = Tokenizer.from_str(json.dumps(described))
    return copy


def any_of(words: Iterable[str]) -> str:
    """Return a regular expression for the longest of some words.

    It matches nothing without words. It branches where words differ, so that the time of a search hardly
    depends on their number.
    """
    words = sorted(words)
    if not words:
        return "(?!)"
    common = takewhile(lambda pair: pair[0] == pair[1], zip(words[0], words[-1], strict=False))
    prefix = "".join(character for character, _ in common)
    groups = by_first_character(word[len(prefix) :] for word in words)
    branches = "|".join(re.escape(first) + any_of(rest) for first, rest in groups.items())
    optional = "?" if prefix in words else ""
    return re.escape(prefix) + (f"(?:{branches}){optional}" if branches else "")


def by_first_character(words: Iterable[str]) -> dict[str, list[str]]:
    """Return the rests of words by the first character. Empty words are left out."""
    groups: dict[str, list[str]] = {}
    for word in words:
        if word:
            groups.setdefault(word[0], []).append(word[1:])
    return groups
