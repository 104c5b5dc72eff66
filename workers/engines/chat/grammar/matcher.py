"""Where a choice is in its grammar."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher

from protocol.errors import EngineError, InvalidRequest, ServiceError

log = logging.getLogger(__name__)

TOO_COMPLEX = re.compile("too (many|big|large|complex)|max is|fuel|limit", re.IGNORECASE)
"""In what llguidance says when one of its limits is reached (sources.py)."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise EngineError for a panic of llguidance: as no Exception it would end the engine thread.

    Its text may quote the answer, and is left out.
    """
    try:
        yield
    except BaseException as error:
        # pyo3 exports no name for its class
        if type(error).__name__ != "PanicException":
            raise
        log.error("llguidance panicked")
        raise EngineError from None


class Tags(NamedTuple):
    """The tokens around the reasoning; None for a tag that is written with several."""

    opening: int | None
    closing: int | None


class Grammar:
    """A grammar, and how far the tokens of one choice have come in it. Used by one thread at a time."""

    __slots__ = ("_matcher", "_param", "_tags", "ends", "first", "late", "thinking")

    def __init__(
        self,
        matcher: LLMatcher,
        first: np.ndarray,
        ends: frozenset[int],
        param: str,
        tags: Tags | None = None,
        *,
        thinking: bool = False,
    ) -> None:
        """`first`: what the first token may be, int32 [words] as in sampling.masks.Masks.

        `ends`: the tokens that may follow a complete text only. `param`: the field of the request. `tags`:
        those of the reasoning, in which the prompt ends if `thinking`.
        """
        self._tags = tags if tags is not None and tags.closing is not None else None
        self.thinking = thinking and self._tags is not None
        """Whether the tokens so far end in reasoning, of which the closing tag is a token."""
        self.late = 0
        """How many tokens were taken since the last mask (filler.py)."""
        self._matcher = matcher
        self._param = param
        self.first = first
        self.ends = ends

    @property
    def matcher(self) -> LLMatcher:
        return self._matcher

    def copy(self) -> "Grammar":
        """Return a grammar for another choice, which is now at the same place."""
        copy = self._matcher.deep_copy()
        return Grammar(copy, self.first, self.ends, self._param, self._tags, thinking=self.thinking)

    def accept(self, token: int) -> bool:
        """Go on by a token. Returns whether the text is complete, so that nothing more may follow.

        Raises InvalidRequest if the grammar takes too much work, EngineError if the token doesn't fit.
        """
        with panics_as_errors():
            fits, stopped = self._matcher.consume_token(token), self._matcher.is_stopped()
        # after an error, as of a mask that took too much work, it allows an end token, and takes it
        if not fits or (stopped and self._matcher.is_error()):
            raise self._failure()
        if self._tags is not None and token in self._tags:
            self.thinking = token == self._tags.opening
        return stopped

    def allows(self, token: int) -> bool | None:
        """Whether the mask would allow the token if nothing is `forced`, in a hundredth of the mask's time.

        None of an end token: only the mask tells.
        """
        if token in self.ends:
            return None
        with panics_as_errors():
            return self._matcher.validate_tokens([token]) == 1

    def forced(self) -> int | None:
        """The only token that the mask would allow where a single text can follow, None elsewhere.

        Tokens may divide a text in several ways. The mask allows the first token of the usual one.
        """
        with panics_as_errors():
            tokens = self._matcher.compute_ff_tokens()
        return tokens[0] if tokens else None

    def _failure(self) -> ServiceError:
        if TOO_COMPLEX.search(self._matcher.get_error()):
            return InvalidRequest(
                f"{self._param} became too complex while the answer was written: the text can be read in too"
                " many ways; make it less ambiguous, or put alternatives into one terminal",
                param=self._param,
            )
        # the text of the error may quote the answer
        log.error("an answer left its grammar: %s", self._matcher.stop_reason())
        return EngineError("the model's answer could not be kept within the format that was asked for")
