"""Puts a model's reasoning before the text that a grammar describes."""

import json
from typing import Any, NamedTuple


class Reasoning(NamedTuple):
    """The reasoning that may come before the content."""

    opening: str
    closing: str
    opened: bool
    """Whether the prompt ends inside it. Else the model may begin with it, or leave it out."""


def after_reasoning(
    answer: dict[str, Any], reasoning: Reasoning, added: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the grammars of llguidance for reasoning, its closing tag, a few spaces, and the text of
    `answer`.

    added: the tokenizer's added tokens, by their text.
    """
    opening, closing = (added.get(tag) for tag in (reasoning.opening, reasoning.closing))
    if closing is None:
        thought = f"thought\nthought[suffix={json.dumps(reasoning.closing)}]: /(?s:.*)/"
    else:
        # the rule of a tag that is an added token allows no other one
        thought = f"THOUGHT <[{closing}]>\nTHOUGHT: /(?s:.*)/"
    tag = json.dumps(reasoning.opening) if opening is None else f"<[{opening}]>"
    before = "reasoning" if reasoning.opened else f"({tag} reasoning)?"
    lark = f"start: {before} @answer\nreasoning: rest SPACE\nrest: {thought}\nSPACE: /[ \\n]{{0,4}}/"
    # a token may go on from a tag into the text behind it, as the model is used to
    return [{"lark_grammar": '%llguidance {"no_forcing": true}\n' + lark}, {**answer, "name": "answer"}]
