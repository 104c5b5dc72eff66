"""Compiling schemas and grammars: what is refused, and what is enforced more strictly than by llguidance."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import date
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from app.chat.output_format import OutputFormatFields
from protocol.errors import Cancelled, EngineError, InvalidRequest, Overloaded, UnsupportedParameter
from protocol.jobs import OutputFormat
from tests.engines.tiny_chat import VOCABULARY, make_tokenizer
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.grammar import compiler as compiler_module
from workers.engines.chat.grammar import sources, threads
from workers.engines.chat.grammar.compiler import GrammarCompiler
from workers.engines.chat.grammar.filler import MaskThreads, PendingMasks
from workers.engines.chat.grammar.matcher import Grammar

TOKENIZER = make_tokenizer()
TEXTS = Vocabulary.of(TOKENIZER)
ENDS = frozenset([TOKENIZER.eos_token_id])
COMPILER = GrammarCompiler(TOKENIZER, VOCABULARY, ENDS)


def compiled(kind: Any, text: Any) -> Grammar:
    text = text if isinstance(text, str) else json.dumps(text)
    return COMPILER.compile(OutputFormat(kind=kind, text=text, param="guided"), "tiny")


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a whole text fits, byte by byte: the tokenizer has a token for each."""
    tokens = {TEXTS.token_bytes(token): token for token in TEXTS.pieces}
    own = grammar.copy()
    try:
        for byte in text.encode():
            own.accept(tokens[bytes([byte])])
        own.accept(TOKENIZER.eos_token_id)
    except EngineError:
        return False
    return True


def refusal(kind: Any, text: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        compiled(kind, text)
    assert caught.value.param == "guided"
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message
    return caught.value.message


def text_of(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(properties)}}


def nested(depth: int, around: Callable[[Any], Any]) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = around(schema)
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "properties": {"a": {"items": {"minContains": 2}}}}, "minContains"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "string", "format": "phone"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "https://example.com/schema"}, "$ref"),
        ({"$ref": "#anchor"}, "$ref"),
        ({"$defs": {"a": {"$anchor": "anchor"}}}, "$anchor"),
        ({"properties": {"a": {"$id": "other"}}}, "$id"),
        ({"$ref": "#/$defs/missing"}, "exist"),
        ({"$ref": "#"}, "no text would fit it"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        ({"type": "text"}, "type"),
        ({"type": 5}, "type"),
        ({"required": "a"}, "required"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, "exclusiveMinimum"),
        ({"anyOf": [{"type": "number", "maximum": 1.5}], "exclusiveMinimum": 1}, "exclusiveMinimum"),
        ({"type": "number", "minimum": 10**400}, "308 digits"),
        ({"enum": [10**400]}, "308 digits"),
        pytest.param('{"minimum": %s}' % ("9" * 5000), "308 digits", id="5000 digits"),
        ("not json", "Expecting value"),
        ([], "object"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_keyword(schema, words):
    assert words in refusal("json_schema", schema)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "a(?=b)", "look-ahead"),
        ("regex", "[", "unclosed"),
        ("grammar", "start: foo", "1(8): unknown name"),
        ("grammar", 'a: "a"\nb ::= "a"', "GBNF"),
        ("grammar", "hello", "Expected token"),
        ("grammar", 'start: %json {"type": "string"}', "%json"),
    ],
)
def test_a_grammar_with_a_mistake_is_refused(kind, text, words):
    assert words in refusal(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", {"type": "object", "properties": {"Sesame": {"type": "Sesame"}}}),
        ("json_schema", {"type": "string", "format": "open sesame"}),
        ("json_schema", {"type": "string", "pattern": "(Sesame"}),
        ("json_schema", {"$ref": "#/$defs/Sesame"}),
        ("json_schema", {"required": "SESAME"}),
        ("json_schema", {"patternProperties": {"^Sesame": {}, "^SesameSesame": {"type": "null"}}}),
        ("json_schema", '{"Sesame'),
        ("regex", "Sesame("),
        ("regex", "Sesame(?=Sesame)"),
        ("grammar", 'start: Sesame\nother: "Sesame"'),
        ("grammar", "start Sesame"),
        ("grammar", "start: Sesame\x7fSesame"),
    ],
)
def test_a_refusal_does_not_quote_the_client(kind, text):
    assert "sesame" not in refusal(kind, text).lower()


@pytest.mark.parametrize(
    ("kind", "text", "written"),
    [
        ("grammar", 'start: "\x7f\u2028a b"', "a b"),
        ("grammar", "start: foo /\u2028a b/", "a b"),
        ("grammar", "start: a b(", "a b"),
        ("json_schema", {"type": "string", "pattern": "[^\\s\\S]"}, "[^"),
        ("json_schema", {"format": "a b/c"}, "a b"),
        ("json_schema", {"type": "a b"}, "a b"),
        ("json_schema", {"$ref": "#/a b/c"}, "a b"),
        ("regex", '[^"q', "[^"),
    ],
)
def test_a_refusal_quotes_no_short_text_either(kind, text, written):
    assert written not in refusal(kind, text)


def test_a_fault_of_the_checks_is_a_refusal_and_a_line_in_the_log(monkeypatch, caplog):
    text = "Sesame"

    def fails(schemas: Any) -> None:
        raise KeyError(text)

    monkeypatch.setattr(sources, "unenforceable", fails)
    assert "could not be checked" in refusal("json_schema", {"type": "string"})
    assert "KeyError" in caplog.text and text not in caplog.text


def multiples(*values: float) -> dict[str, Any]:
    return {"type": "array", "prefixItems": [{"type": "number", "multipleOf": value} for value in values]}


def patterns(count: int, **rest: Any) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f".*{chr(97 + at)}.{{{at}}}.*", **rest} for at in range(count)]


HOSTILE: dict[str, tuple[str, Any]] = {
    "properties": ("json_schema", text_of(1001)),
    "required": ("json_schema", {"type": "object", "required": [f"r{at}" for at in range(1001)]}),
    "pattern properties": (
        "json_schema",
        {"patternProperties": {f"^{at}x": {"type": "null"} for at in range(1001)}},
    ),
    "enum": ("json_schema", {"enum": list(range(1001))}),
    "multiple of a large number": ("json_schema", multiples(100_001)),
    "multiple of many digits": ("json_schema", multiples(99999.9)),
    "multiple of a very large number": ("json_schema", multiples(1e300)),
    "many multiples": ("json_schema", multiples(*range(9001, 9021))),
    "multiples of one value": (
        "json_schema",
        {"allOf": [{"type": "integer", "multipleOf": value} for value in (997, 991)]},
    ),
    "intersected patterns": ("json_schema", {"allOf": patterns(20)}),
    "intersected patterns by reference": (
        "json_schema",
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{at}": {**part, "$ref": f"#/$defs/d{at + 1}"} if at < 19 else part
                for at, part in enumerate(patterns(20))
            },
        },
    ),
    "intersected patterns of a property": (
        "json_schema",
        {"allOf": [{"type": "object", "properties": {"a": part}} for part in patterns(20)]},
    ),
    "product of alternatives": (
        "json_schema",
        {"allOf": [{"anyOf": [text_of(3), {"minimum": at}, *patterns(8)]} for at in range(8)]},
    ),
    "depth": ("json_schema", nested(400, lambda schema: {"items": schema})),
    "depth beyond Python's": ("json_schema", '{"items":' * 9000 + "{}" + "}" * 9000),
    "circle": ("json_schema", {"allOf": [{"$ref": "#"}, {"type": "object"}]}),
    "circle through definitions": (
        "json_schema",
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, *patterns(14)]}}},
    ),
    "rules": ("grammar", "start: r0\n" + "\n".join(f'r{at}: "a{at}"' for at in range(1001))),
    "doubling terminals": (
        "grammar",
        "start: T0\n" + "\n".join(f"T{at}: T{at + 1} T{at + 1}" for at in range(40)) + '\nT40: "a"',
    ),
    "intersected terminals": (
        "grammar",
        "start: T\nT: " + " & ".join(f"/.*{chr(97 + at)}.{{{at}}}.*/" for at in range(26)),
    ),
    "depth of a grammar": ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "depth of a regular expression": ("regex", "(" * 20_000 + ")" * 20_000),
    "blank lines": ("grammar", " \n" * 32_000),
    "llguidance's own form": (
        "grammar",
        '{"grammars": [{"json_schema": {"type": "integer", "multipleOf": 99999989}}]}',
    ),
    "nul": ("grammar", 'start: "\0"'),
    "half a character": ("json_schema", '{"const": "\\ud800"}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_too_long_is_refused_at_once(name):
    assert "too long" not in refusal(*HOSTILE[name])


OPEN = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(10_000)}}
REQUESTS: dict[str, tuple[str, Any, str]] = {
    "10,000 properties": ("guided_json", OPEN, "bytes"),
    "10,000 closed properties": ("guided_json", {**OPEN, "additionalProperties": False}, "bytes"),
    "4,000 properties within the size": (
        "guided_json",
        {"properties": {str(at): {} for at in range(4000)}, "additionalProperties": False},
        "at most 1000 properties",
    ),
    "100,000 values": ("guided_json", {"enum": list(range(100_000))}, "bytes"),
    "10,000 values within the size": (
        "guided_json",
        {"enum": list(range(10_000))},
        "at most 1000 enum values",
    ),
    "200,000 groups": ("guided_regex", "(" * 200_000 + "a" + ")" * 200_000, "bytes"),
    "30,000 groups within the size": ("guided_regex", "(" * 30_000 + "a" + ")" * 30_000, "guided_regex"),
    "a multiple": ("guided_json", {"type": "integer", "multipleOf": 1234567}, "multipleOf must be at most"),
    "3,000 rules": (
        "guided_grammar",
        "start: r0\n" + "\n".join(f'r{at}: "a" r{at + 1}' for at in range(3000)) + '\nr3000: "b"',
        "at most 1000 rules",
    ),
    "a reference to itself": ("guided_json", {"$ref": "#"}, "no text would fit it"),
    "references in a circle": (
        "guided_json",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no text would fit it",
    ),
    "1 MB of a regular expression": ("guided_regex", "a" * 2**20, "bytes"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused_by_its_field_and_bound(name):
    """Either where the request arrives or where its format is compiled, without a compilation of its size."""
    field, value, words = REQUESTS[name]
    with pytest.raises(InvalidRequest, match=words) as caught:
        wanted = OutputFormatFields.model_validate({field: value}).output_format()
        assert wanted is not None
        COMPILER.compile(wanted, "tiny")
    assert caught.value.param == field and "too long" not in caught.value.message


LARGE: dict[str, tuple[str, Any]] = {
    "properties": ("json_schema", {**text_of(1000), "additionalProperties": False}),
    "enum": ("json_schema", {"enum": [f"{at:060d}" for at in range(1000)]}),
    "multiple": ("json_schema", multiples(19_997)),
    "multiples with zeros": ("json_schema", multiples(100_000, 5000, 0.01, 0.5, 60)),
    "lengths": ("json_schema", {"type": "array", "minItems": 10**6, "items": {"minLength": 10**6}}),
    "repetition": ("regex", "(a{1,1000}){1,1000}"),
    "a state for each past": ("regex", "(a|b)*a(a|b){200}"),
    "choices": ("choice", [f"choice {at} of {at * 77}" for at in range(1000)]),
    "a long constant": ("json_schema", {"const": "x" * 60_000}),
    "many patterns": (
        "json_schema",
        {"type": "object", "properties": {f"p{at}": part for at, part in enumerate(patterns(26))}},
    ),
    "doubling references": (
        "json_schema",
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                "d40": {"type": "null"},
                **{f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)},
            },
        },
    ),
    "rules": (
        "grammar",
        "start: r0\n" + "\n".join(f'r{at}: "a" r{at + 1}' for at in range(998)) + '\nr998: "b"',
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_within_the_bounds_compiles(name):
    compiled(*LARGE[name])


CONTROLS = ["a\x7fb", "a\x00b", "a\\\x7f", "a\x80b", "a\u2028b", "a/b\t"]


def test_dates_exist(name="date"):
    grammar = compiled("json_schema", {"type": "string", "format": name})
    for year in (1, 4, 96, 100, 400, 1900, 1904, 1999, 2000, 2023, 2024, 2100, 9996, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = f"{year:04d}-{month:02d}-{day:02d}"
                try:
                    exists = date.fromisoformat(text) is not None
                except ValueError:
                    exists = False
                assert accepts(grammar, f'"{text}"') == exists, text
    assert not accepts(grammar, '"0000-01-01"')


def test_a_time_is_one_that_every_library_reads():
    grammar = compiled("json_schema", {"type": "string", "format": "date-time"})
    for text, fits in {
        "2024-02-29T23:59:59Z": True,
        "2024-02-29T00:00:00.123+05:30": True,
        "2024-02-29t00:00:00z": False,
        "2024-02-29T24:00:00Z": False,
        "2024-02-29T23:59:60Z": False,
        "2023-02-29T23:59:59Z": False,
        "2024-02-29T23:59:59": False,
    }.items():
        assert accepts(grammar, f'"{text}"') == fits, text


def test_a_name_is_not_written_twice_to_reach_minProperties():
    schema = {
        "type": "object",
        "required": ["a"],
        "additionalProperties": {"type": "null"},
        "minProperties": 2,
    }
    grammar = compiled("json_schema", schema)
    assert accepts(grammar, '{"a":null,"b":null}') and not accepts(grammar, '{"a":null}')


@pytest.mark.parametrize(
    ("kind", "text", "fits", "others"),
    [
        ("regex", "[ab]+c?", ["a", "abc"], ["", "c", "abcc"]),
        ("regex", "^ab$", ["ab"], ["abc"]),
        (
            "choice",
            ["yes", "no", 'say "no"', "n\no", "naïve 😀"],
            ["yes", 'say "no"', "n\no", "naïve 😀"],
            ["y", "say", ""],
        ),
        ("choice", CONTROLS, CONTROLS, ["ab"]),
        ("grammar", 'start: "a" start "b" | "c"', ["c", "acb", "aacbb"], ["acbb", "ab"]),
        ("json_schema", {"type": "object"}, ["{}", '{"a":[1,{}]}'], ["[]", "{ }", '{"a": 1}', "{'a':1}"]),
    ],
)
def test_texts_fit_wholly(kind, text, fits, others):
    grammar = compiled(kind, text)
    assert [accepts(grammar, one) for one in fits] == [True] * len(fits)
    assert [accepts(grammar, one) for one in others] == [False] * len(others)


WANTED = OutputFormat(kind="regex", text="a", param="guided")


class SlowCompiler:
    """A compiler whose threads wait for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiler = GrammarCompiler(TOKENIZER, VOCABULARY, ENDS)
        self.go = threading.Event()
        source = sources.source_of_format

        def waits(wanted: OutputFormat) -> dict[str, Any]:
            self.go.wait(60)
            return source(wanted)

        monkeypatch.setattr(compiler_module, "source_of_format", waits)

    def compile(self, cancelled: Callable[[], bool] = lambda: False) -> Grammar:
        return self.compiler.compile(WANTED, "tiny", cancelled=cancelled)

    def fill(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let all threads be held by requests that have given up."""
        monkeypatch.setattr(threads, "LIMIT_S", 0.01)
        for _ in range(threads.THREADS):
            with pytest.raises(InvalidRequest, match="too long to prepare") as caught:
                self.compile()
            assert caught.value.param == "guided"
        monkeypatch.setattr(threads, "LIMIT_S", 60)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCompiler]:
    made = SlowCompiler(monkeypatch)
    yield made
    made.go.set()


def test_a_grammar_that_takes_too_long_is_refused_and_holds_its_place_until_it_ends(slow, monkeypatch):
    slow.fill(monkeypatch)
    monkeypatch.setattr(threads, "BURST_S", 0.01)
    monkeypatch.setattr(threads, "QUEUE_S", 0.02)
    with pytest.raises(Overloaded):
        slow.compile()
    slow.go.set()
    monkeypatch.setattr(threads, "QUEUE_S", 60)
    assert slow.compile().first.any()


def test_few_requests_wait_for_long_and_others_are_told_at_once(slow, monkeypatch):
    slow.fill(monkeypatch)
    monkeypatch.setattr(threads, "BURST_S", 0.01)
    monkeypatch.setattr(threads, "QUEUE_S", 60)
    with ThreadPoolExecutor(3 * threads.WAITING) as pool:
        requests = [pool.submit(slow.compile) for _ in range(3 * threads.WAITING)]
        ended = as_completed(requests, timeout=60)
        refused = [next(ended) for _ in range(2 * threads.WAITING)]
        slow.go.set()
        assert all(isinstance(request.exception(), Overloaded) for request in refused)
        assert all(request.result().first.any() for request in ended)


def test_many_requests_wait_for_a_short_time(slow, monkeypatch):
    monkeypatch.setattr(threads, "LIMIT_S", 60)
    monkeypatch.setattr(threads, "BURST_S", 60)
    polled = [threading.Event() for _ in range(32)]
    with ThreadPoolExecutor(32) as pool:
        requests = [pool.submit(slow.compile, lambda one=one: bool(one.set())) for one in polled]
        waiting = all(one.wait(60) for one in polled)
        slow.go.set()
        assert waiting
        assert all(request.result(60).first.any() for request in requests)


def test_a_request_that_is_cancelled_stops_waiting(slow, monkeypatch):
    gone = threading.Event()
    with ThreadPoolExecutor(threads.THREADS + 1) as pool:
        requests = [pool.submit(slow.compile, gone.is_set) for _ in range(threads.THREADS + 1)]
        gone.set()
        assert all(isinstance(request.exception(60), Cancelled) for request in requests)
    assert not slow.go.is_set()


def word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1, "<|end|>": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize(
    ("tokenizer", "ends"), [(word_level(), {2}), (TOKENIZER, set())], ids=["WordPiece", "no end token"]
)
def test_a_tokenizer_that_cannot_be_constrained_refuses_by_the_name_of_the_model(tokenizer, ends):
    made = GrammarCompiler(tokenizer, VOCABULARY, frozenset(ends))
    for _ in range(2):
        with pytest.raises(UnsupportedParameter, match="not supported by model 'tiny'") as caught:
            made.compile(OutputFormat(kind="regex", text="a", param="guided"), "tiny")
        assert caught.value.param == "guided"


def test_all_end_tokens_may_follow_a_complete_text():
    ends = frozenset(TOKENIZER.convert_tokens_to_ids(["<|end|>", "<|user|>"]))
    grammar = GrammarCompiler(TOKENIZER, VOCABULARY, ends).compile(
        OutputFormat(kind="regex", text="a?", param="guided"), "tiny"
    )
    allowed = np.flatnonzero(np.unpackbits(grammar.first.view(np.uint8), bitorder="little"))
    assert {TEXTS.token_bytes(int(token)) for token in allowed} == {b"a", b"<|end|>", b"<|user|>"}


def test_a_copy_goes_its_own_way():
    grammar = compiled("choice", ["ab", "ac"])
    tokens = {TEXTS.token_bytes(token): token for token in TEXTS.pieces}
    assert not grammar.accept(tokens[b"a"])
    other = grammar.copy()
    assert grammar.accept(tokens[b"b"]) and other.accept(tokens[b"c"])


def test_a_text_with_too_many_readings_fails_as_the_request_of_its_client():
    grammar = compiled("grammar", 'start: s\ns: s s s | s s | "a" | "aa"')
    token = {TEXTS.token_bytes(token): token for token in TEXTS.pieces}[b"a"]
    mask = np.empty(COMPILER.words, np.int32)
    with pytest.raises(InvalidRequest, match="too complex") as caught:
        for _ in range(200):
            grammar.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            grammar.accept(token)
    assert caught.value.param == "guided"
    with pytest.raises(EngineError):
        compiled("regex", "a").accept(5)


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust."""


class PanickingMatcher:
    def consume_token(self, token: int) -> bool:
        raise PanicException("Sesame")

    def is_stopped(self) -> bool:
        return False


def test_a_panic_is_the_error_of_one_request():
    matcher: Any = PanickingMatcher()
    grammar = Grammar(matcher, np.zeros(1, np.int32), ENDS, "guided")
    with pytest.raises(EngineError) as caught:
        grammar.accept(5)
    assert "Sesame" not in caught.value.message
    pending = PendingMasks([], np.zeros((0, 1), np.int32), MaskThreads(1))
    pending.unfilled = Future()
    pending.unfilled.set_exception(PanicException("Sesame"))
    with pytest.raises(EngineError):
        pending.stop()
