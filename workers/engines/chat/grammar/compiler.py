"""Compiles what a request asks its answer to be.

Runs in the thread that submits, never in the engine thread.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import OutputFormat
from workers.engines.chat.answer.constraint import CallConstraint
from workers.engines.chat.grammar.matcher import Grammar, Tags
from workers.engines.chat.grammar.reasoning import Reasoning, after_reasoning
from workers.engines.chat.grammar.sources import (
    LIMITS,
    LIMITS_OF_GRAMMARS,
    refusal,
    source_of_format,
    sources_of_calls,
)
from workers.engines.chat.grammar.threads import CompileThreads


class GrammarCompiler:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, ends: frozenset[int]) -> None:
        """`vocabulary_size`: number of the model's logits. `ends`: the tokens that end an answer."""
        self._tokenizer = tokenizer
        ids = max(tokenizer.get_vocab().values(), default=0) + 1
        self._bits = max(vocabulary_size, ids)
        self._ends = frozenset(token for token in ends if token < ids)
        self._compiled: LLTokenizer | None = None
        decoder = tokenizer.added_tokens_decoder
        self._added = {added.content: token for token, added in decoder.items()}
        self._lock = threading.Lock()
        self._threads = CompileThreads()

    @property
    def words(self) -> int:
        """Number of words, of 32 bits, of a mask."""
        return -(-self._bits // 32)

    def compile(
        self,
        wanted: OutputFormat | CallConstraint,
        model: str,
        reasoning: Reasoning | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Grammar:
        """Compile a grammar. `reasoning`: what may come before the text that it describes.

        `cancelled` is asked while this waits. Raises InvalidRequest, UnsupportedParameter, Overloaded or
        Cancelled.
        """
        tokenizer = self._tokens(wanted.param, model)

        def work(abandoned: Callable[[], bool]) -> Grammar:
            return self._compile(wanted, tokenizer, reasoning, abandoned)

        return self._threads.run(work, wanted.param, cancelled)

    def _tokens(self, param: str, model: str) -> LLTokenizer:
        """Return the tokenizer as llguidance needs it: made once, at the first request that asks for it."""
        with self._lock:
            if self._compiled is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                try:
                    if backend is None or not self._ends:
                        raise ValueError
                    self._compiled = LLTokenizer(
                        backend.to_str(), n_vocab=self._bits, eos_token=sorted(self._ends)
                    )
                except ValueError as error:
                    raise UnsupportedParameter(
                        f"structured output is not supported by model {model!r}: its tokenizer is of a kind"
                        f" that can't be constrained; leave {param} out",
                        param=param,
                    ) from error
            return self._compiled

    def _compile(
        self,
        wanted: OutputFormat | CallConstraint,
        tokenizer: LLTokenizer,
        reasoning: Reasoning | None,
        abandoned: Callable[[], bool],
    ) -> Grammar:
        try:
            if isinstance(wanted, CallConstraint):
                sources = sources_of_calls(wanted, abandoned)
            else:
                sources = [source_of_format(wanted)]
        except (ValueError, RecursionError) as error:
            raise refusal(wanted, str(error)) from error
        *earlier, last = sources
        for source in earlier:
            try:
                return self._grammar(wanted, source, tokenizer, reasoning)
            except InvalidRequest:
                if abandoned():
                    raise
        return self._grammar(wanted, last, tokenizer, reasoning)

    def _grammar(
        self,
        wanted: OutputFormat | CallConstraint,
        source: dict[str, Any],
        tokenizer: LLTokenizer,
        reasoning: Reasoning | None,
    ) -> Grammar:
        grammars, tags = [source], None
        if reasoning is not None:
            grammars = after_reasoning(source, reasoning, self._added)
            tags = Tags(self._added.get(reasoning.opening), self._added.get(reasoning.closing))
        limits = LIMITS
        if isinstance(wanted, OutputFormat) and wanted.kind == "grammar":
            limits = LIMITS_OF_GRAMMARS
        # as JSON always: a Lark grammar that begins like JSON would be read as this form, past the bounds
        matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        _refuse_error(wanted, matcher)
        if warnings := matcher.get_grammar_warnings():
            raise refusal(wanted, "; ".join(warnings))
        first = np.empty(self.words, np.int32)
        # the first mask is the one that takes longest, and forks of a choice share it
        matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        _refuse_error(wanted, matcher)
        thinking = reasoning is not None and reasoning.opened
        return Grammar(matcher, first, self._ends, wanted.param, tags, thinking=thinking)


def _refuse_error(wanted: OutputFormat | CallConstraint, matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise refusal(wanted, matcher.get_error())
