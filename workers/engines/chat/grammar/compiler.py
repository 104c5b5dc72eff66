"""Compiles what a request asks its answer to be.

Runs in the thread that submits, never in the engine thread.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from protocol.errors import EngineError, InvalidRequest, Overloaded, UnsupportedParameter
from protocol.jobs import OutputFormat
from workers.engines.chat.answer.constraint import CallConstraint
from workers.engines.chat.grammar.bounds import excess_of_grammar, excess_of_schema
from workers.engines.chat.grammar.corrections import exact_formats, unenforceable
from workers.engines.chat.grammar.matcher import Grammar, Tags
from workers.engines.chat.grammar.reasoning import Reasoning, after_reasoning
from workers.engines.chat.grammar.reasons import explain
from workers.engines.chat.grammar.schema import Schemas

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

T = TypeVar("T")

LIMIT_S = 5.0
"""Time to compile a grammar. Within the bounds (bounds.py) it takes milliseconds, at most half a second."""

QUEUE_S = 20.0
THREADS = 2
"""How many grammars are compiled at once. One that exceeds its time goes on: it can't be stopped."""


def _limits(items: int) -> LLParserLimits:
    """`items`: the largest number of ways in which a text so far can be read."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        max_grammar_size=30_000,
        max_lexer_states=20_000,
        step_lexer_fuel=50_000,
        step_max_items=2 * items,
        max_items_in_row=items,
        verbose_errors=False,
    )


LIMITS = _limits(2000)
"""Of what isn't ambiguous. A property that may be left out counts up to four times."""

LIMITS_OF_GRAMMARS = _limits(300)
"""The time of a step grows with the square of it: `s: s s | "a"` takes 10 ms, and with 2,000 it takes a second."""

JSON_OPTIONS: "JsonCompileOptions" = {
    # models fill whitespace that is allowed without end
    "whitespace_flexible": False,
    # what can't be enforced is refused
    "lenient": False,
    "coerce_one_of": False,
}


SPACES_OF_CALLS = {"item_separator": ", ", "key_separator": ": "}
"""As chat templates write the arguments of calls, and models therefore."""


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
        self._slots = threading.BoundedSemaphore(THREADS)

    @property
    def words(self) -> int:
        """Number of words, of 32 bits, of a mask."""
        return -(-self._bits // 32)

    def compile(
        self, wanted: OutputFormat | CallConstraint, model: str, reasoning: Reasoning | None = None
    ) -> Grammar:
        """Compile a grammar. `reasoning`: what may come before the text that it describes.

        Raises InvalidRequest, UnsupportedParameter or Overloaded.
        """
        tokenizer = self._tokens(wanted.param, model)
        if not self._slots.acquire(timeout=QUEUE_S):
            raise Overloaded("too many requests for structured output are being prepared; try again later")
        return self._within_limit(lambda: self._compile(wanted, tokenizer, reasoning), wanted.param)

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

    def _within_limit(self, work: Callable[[], T], param: str) -> T:
        """Do `work` in a thread of its own, which holds a slot until it ends."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                # a panic of llguidance is no Exception
                done.set_exception(error if isinstance(error, Exception) else EngineError())
            finally:
                self._slots.release()

        threading.Thread(target=run, name="grammar", daemon=True).start()
        try:
            return done.result(LIMIT_S)
        except TimeoutError:
            raise InvalidRequest(f"{param} takes too long to prepare; make it simpler", param=param) from None

    def _compile(
        self, wanted: OutputFormat | CallConstraint, tokenizer: LLTokenizer, reasoning: Reasoning | None
    ) -> Grammar:
        try:
            grammars = [_of_calls(wanted) if isinstance(wanted, CallConstraint) else _grammar(wanted)]
        except (ValueError, RecursionError) as error:
            raise _refusal(wanted, str(error)) from error
        tags = None
        if reasoning is not None:
            grammars = after_reasoning(grammars[0], reasoning, self._added)
            tags = Tags(self._added.get(reasoning.opening), self._added.get(reasoning.closing))
        limits = LIMITS
        if isinstance(wanted, OutputFormat) and wanted.kind == "grammar":
            limits = LIMITS_OF_GRAMMARS
        # as JSON always: a Lark grammar that begins like JSON would be read as this form, past the bounds
        matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        _refuse_error(wanted, matcher)
        if warnings := matcher.get_grammar_warnings():
            raise _refusal(wanted, "; ".join(warnings))
        first = np.empty(self.words, np.int32)
        # the first mask is the one that takes longest, and forks of a choice share it
        matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        _refuse_error(wanted, matcher)
        thinking = reasoning is not None and reasoning.opened
        return Grammar(matcher, first, self._ends, wanted.param, tags, thinking=thinking)


def _grammar(wanted: OutputFormat) -> dict[str, Any]:
    """Return the grammar in llguidance's own form. Raises InvalidRequest."""
    text = wanted.text
    if wanted.kind == "json_schema":
        return _only(_json_source(_checked(wanted)), "json_schema")
    if wanted.kind == "regex":
        return _only(LLMatcher.grammar_from_regex(text), "lark_grammar")
    if wanted.kind == "choice":
        choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        # as one terminal they are compiled into one automaton
        return {"lark_grammar": "start: TEXT\nTEXT: " + " | ".join(choices)}
    _refuse(wanted, excess_of_grammar(text))
    return {"lark_grammar": text}


def _checked(wanted: OutputFormat) -> Any:
    """Return a JSON Schema as llguidance enforces it. Raises InvalidRequest."""
    try:
        schemas = Schemas(json.loads(wanted.text))
        _refuse(wanted, excess_of_schema(schemas) or unenforceable(schemas))
        exact_formats(schemas)
    except (ValueError, RecursionError) as error:
        raise _refusal(wanted, str(error)) from error
    return schemas.root


def _json_source(schema: Any) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _of_calls(calls: CallConstraint) -> dict[str, Any]:
    """Return the grammar of an answer with calls in llguidance's own form. Raises InvalidRequest."""
    schemas = []
    for wanted in calls.schemas:
        schema = _checked(wanted)
        # by itself at first, so that an error names the tool
        _, messages = LLMatcher.validate_grammar_with_warnings(_json_source(schema), limits=LIMITS)
        if messages:
            raise _refusal(wanted, "; ".join(messages))
        schemas.append({**schema, "x-guidance": {**JSON_OPTIONS, **SPACES_OF_CALLS}})
    return {"lark_grammar": calls.write(schemas)}


def _only(source: str, kind: str) -> dict[str, Any]:
    (grammar,) = json.loads(source)["grammars"]
    return {kind: grammar[kind]}


def _refuse(wanted: OutputFormat, reason: str | None) -> None:
    if reason is not None:
        raise InvalidRequest(f"{wanted.param} can't be enforced: {reason}", param=wanted.param)


def _refuse_error(wanted: OutputFormat | CallConstraint, matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise _refusal(wanted, matcher.get_error())


def _refusal(wanted: OutputFormat | CallConstraint, error: str) -> InvalidRequest:
    """Make the answer to an error of llguidance, or of what it is given."""
    text = wanted.text if isinstance(wanted, OutputFormat) else "".join(one.text for one in wanted.schemas)
    return InvalidRequest(f"{wanted.param} can't be enforced: {explain(error, text)}", param=wanted.param)
