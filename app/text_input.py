"""A field that has a text, tokens, or a list of either: `prompt` of completions, `input` of embeddings."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

MAX_TOKEN_ID = 2**31

TokenId = Annotated[StrictInt, Field(ge=0, lt=MAX_TOKEN_ID)]


def form_of(given: object) -> Literal["text", "texts", "tokens", "token lists"]:
    """Return the tag of the form that a value has, so that a long one is validated as that alone."""
    if not isinstance(given, list):
        return "text"
    first = given[0] if given else ""
    return "texts" if isinstance(first, str) else "token lists" if isinstance(first, list) else "tokens"


def listed(given: Any) -> Sequence[str | list[int]]:
    """Return the texts, or lists of tokens, of a valid value: one for a single text or list of tokens."""
    texts: Sequence[str | list[int]] = given if form_of(given) in ("texts", "token lists") else [given]
    return texts
