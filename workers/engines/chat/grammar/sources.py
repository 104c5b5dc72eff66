"""Checks what a request asks for, and writes it as llguidance takes it.

Runs in a thread of CompileThreads. Schemas are checked before native code sees them: it can't be stopped.
"""

import json
import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits

from protocol.errors import Cancelled, InvalidRequest
from protocol.jobs import OutputFormat
from workers.engines.chat.answer.constraint import ANY_OBJECT, CallConstraint
from workers.engines.chat.grammar.bounds import MAX_RULES, Amounts, excess_of_grammar
from workers.engines.chat.grammar.corrections import correct, unenforceable
from workers.engines.chat.grammar.gbnf import is_gbnf
from workers.engines.chat.grammar.gbnf_lark import to_lark
from workers.engines.chat.grammar.reasons import explain
from workers.engines.chat.grammar.schema import Schemas

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)


def _limits(items: int, items_of_mask: int) -> LLParserLimits:
    """`items`: the largest number of ways in which a text so far can be read.

    `items_of_mask`: those of all texts that a mask looks at, together.
    """
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        max_grammar_size=30_000,
        max_lexer_states=20_000,
        step_lexer_fuel=50_000,
        step_max_items=items_of_mask,
        max_items_in_row=items,
        verbose_errors=False,
    )


LIMITS = _limits(2000, 4000)
"""Of what isn't ambiguous. A property that may be left out counts up to four times."""

LIMITS_OF_GRAMMARS = _limits(300, 6000)
"""The time of a step grows with the square of the first: `s: s s | "a"` takes 6 ms, and with 2,000 a second.

The second allows rules of single characters, as for spaces, with 128,000 tokens.
"""

JSON_OPTIONS: "JsonCompileOptions" = {
    # models fill whitespace that is allowed without end
    "whitespace_flexible": False,
    # what can't be enforced is refused
    "lenient": False,
    "coerce_one_of": False,
}

OPTIONS_OF_CALLS = {**JSON_OPTIONS, "item_separator": ", ", "key_separator": ": "}
"""Spaces as chat templates write the arguments of calls, and models therefore."""


def source_of_format(wanted: OutputFormat) -> dict[str, Any]:
    """Return the grammar in llguidance's own form. Raises InvalidRequest."""
    text = wanted.text
    if wanted.kind == "json_schema":
        return _only(_json_source(_checked(wanted, Amounts())[0]), "json_schema")
    if wanted.kind == "regex":
        return _only(LLMatcher.grammar_from_regex(text), "lark_grammar")
    if wanted.kind == "choice":
        choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        # as one terminal they are compiled into one automaton
        terminal = " | ".join(choices).replace("\x7f", r"\u007f")
        return {"lark_grammar": f"start: TEXT\nTEXT: {terminal}"}
    if is_gbnf(text):
        try:
            text = to_lark(text, MAX_RULES)
        except ValueError as error:
            _refuse(wanted, str(error))
    _refuse(wanted, excess_of_grammar(text))
    return {"lark_grammar": text}


def sources_of_calls(calls: CallConstraint, abandoned: Callable[[], bool]) -> list[dict[str, Any]]:
    """Return the grammar of an answer with calls, and then one that asks for less, if there is one.

    `abandoned` is asked before each schema. Raises InvalidRequest, and Cancelled once it is so.
    """
    schemas: list[Any] = [ANY_OBJECT] * len(calls.schemas)
    amounts = Amounts()
    if calls.unused is not None:
        _, amounts = _valid(calls.unused, amounts)
    # what must be enforced comes first: the bounds hold for all schemas together
    for at in sorted(range(len(schemas)), key=lambda at: calls.schemas[at].optional):
        if abandoned():
            raise Cancelled
        try:
            schemas[at], amounts = _valid(calls.schemas[at].format, amounts)
            _refuse(calls.schemas[at].format, calls.schemas[at].unenforceable(schemas[at]))
        except InvalidRequest:
            if not calls.schemas[at].optional:
                raise
    least = [ANY_OBJECT if one.optional else schemas[at] for at, one in enumerate(calls.schemas)]
    return [_source_of_calls(calls, some) for some in ([schemas] if least == schemas else [schemas, least])]


def _source_of_calls(calls: CallConstraint, schemas: list[Any]) -> dict[str, Any]:
    return {"lark_grammar": calls.write([{**schema, "x-guidance": OPTIONS_OF_CALLS} for schema in schemas])}


def _valid(wanted: OutputFormat, others: Amounts) -> tuple[Any, Amounts]:
    """Return what `_checked` does, for a schema that llguidance takes by itself: an error names its tool."""
    schema, amounts = _checked(wanted, others)
    _, messages = LLMatcher.validate_grammar_with_warnings(_json_source(schema), limits=LIMITS)
    if messages:
        raise refusal(wanted, "; ".join(messages))
    return schema, amounts


def _checked(wanted: OutputFormat, others: Amounts) -> tuple[Any, Amounts]:
    """Return a JSON Schema as llguidance enforces it, and the amounts of it and `others`.

    Raises InvalidRequest.
    """
    try:
        schemas = Schemas(json.loads(wanted.text))
        amounts = others.joined(Amounts.of(schemas))
        _refuse(wanted, amounts.excess() or unenforceable(schemas))
        correct(schemas)
    except InvalidRequest:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        # no JSON, a number that is too large for a float, too deep
        raise refusal(wanted, str(error)) from error
    except Exception as error:
        # a fault of the checks, and yet it is the client's schema that can't be enforced
        places = "".join(traceback.format_tb(error.__traceback__))
        log.error("a schema could not be checked: %s\n%s", type(error).__name__, places)
        raise refusal(wanted, "it could not be checked") from None
    return schemas.root, amounts


def _json_source(schema: Any) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _only(source: str, kind: str) -> dict[str, Any]:
    (grammar,) = json.loads(source)["grammars"]
    return {kind: grammar[kind]}


def _refuse(wanted: OutputFormat, reason: str | None) -> None:
    if reason is not None:
        raise InvalidRequest(f"{wanted.param} can't be enforced: {reason}", param=wanted.param)


def refusal(wanted: OutputFormat | CallConstraint, error: str) -> InvalidRequest:
    """Make the answer to an error of llguidance, or of what it is given."""
    return InvalidRequest(
        f"{wanted.param} can't be enforced: {explain(error, wanted.text)}", param=wanted.param
    )
