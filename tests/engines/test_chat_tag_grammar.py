"""Grammars of calls that are no JSON: whatever a model's tokens are, they are read as calls that fit."""

import json
import random
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from protocol.errors import InvalidRequest
from protocol.jobs import ChatJob, OutputFormat
from tests.engines import chat_templates as templates
from tests.engines.test_chat_answer_calls import Answer, feed, job
from tests.engines.test_chat_answer_thinking import tokenizer
from workers.engines.chat.answer.format import AnswerFormat
from workers.engines.chat.detokenizer import Vocabulary
from workers.engines.chat.grammar.compiler import GrammarCompiler
from workers.engines.chat.grammar.matcher import Grammar

LONGEST = 400
DSML = templates.MINIMAX_M2.replace("minimax:tool_call", "｜DSML｜function_calls").replace(
    "invoke", "｜DSML｜invoke"
)
DSML = DSML.replace("parameter", "｜DSML｜parameter").replace(
    """'">' ~ (value if value is string else value | tojson)""",
    """('" string="true">' ~ value if value is string else '" string="false">' ~ value | tojson)""",
)
SEED = templates.QWEN3_CODER.replace("tool_call>", "seed:tool_call>")
SEED = SEED.replace("~ key ~ '>\\n'", "~ key ~ '>'").replace("'\\n</parameter>", "'</parameter>")

FUNCTION_GEMMA = templates.GEMMA_4.replace("<|tool_call>", "<start_function_call>")
FUNCTION_GEMMA = FUNCTION_GEMMA.replace("<tool_call|>", "<end_function_call>").replace('<|"|>', "<escape>")

FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen3 coder": (templates.QWEN3_CODER, ()),
    "qwen3 coder with tokens": (templates.QWEN3_CODER, ("<tool_call>", "</tool_call>")),
    "seed": (SEED, ("<seed:tool_call>", "</seed:tool_call>")),
    "glm": (templates.GLM_4_5, ()),
    "glm with tokens": (
        templates.GLM_4_5,
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "minimax": (templates.MINIMAX_M2, ("<minimax:tool_call>", "</minimax:tool_call>")),
    "dsml": (DSML, ("｜DSML｜",)),
    "dsml without tokens": (DSML, ()),
    "gemma": (templates.GEMMA_4, ()),
    "gemma with tokens": (
        templates.GEMMA_4,
        ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
    ),
    "function gemma": (FUNCTION_GEMMA, ("<escape>", "<start_function_call>", "<end_function_call>")),
    "gpt-oss": (
        templates.GPT_OSS,
        (
            "<|channel|>",
            "<|message|>",
            "<|constrain|>",
            "<|start|>",
            "<|end|>",
            "<|call|>",
            '<|"|>',
            "<escape>",
            "<channel|>",
        ),
    ),
}
"""Each with the control tokens that its tokenizer has."""


TURNS = {
    "qwen3 coder": "<tool_call>\n<function=",
    "qwen3 coder with tokens": "<tool_call>\n<function=",
    "seed": "<seed:tool_call>\n<function=",
    "glm": "<tool_call>",
    "glm with tokens": "<tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="',
    "dsml": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="',
    "dsml without tokens": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="',
    "gemma": "<|tool_call>call:",
    "gemma with tokens": "<|tool_call>call:",
    "function gemma": "<start_function_call>call:",
    "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.",
}
"""What a call begins with."""


PLACE = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "name": {"type": "string", "maxLength": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
DEFINITIONS = {"unit": {"enum": ["C", "F"], "title": "Unit"}, "place": PLACE}


def schema(*required: str, **properties: Any) -> dict[str, Any]:
    made = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return made | ({"$defs": DEFINITIONS} if "$ref" in str(properties) else {})


SCHEMAS: dict[str, dict[str, Any]] = {
    "text": schema("city", city={"type": "string"}),
    "short": schema("city", "nick", city={"type": "string", "maxLength": 8}, nick={"minLength": 2, "type": "string"}),
    "choices": schema(
        "a", "b", a={"enum": ["", "a", "ab", "a\n"]}, b={"const": "</b>"}, c={"enum": [1, 2.5, None, True]}
    ),
    "numbers": schema(
        "i", "n", i={"type": "integer", "minimum": -9, "maximum": 99}, n={"type": "number"}, f={"type": "boolean"}
    ),
    "optional": schema(
        "b", a={"type": "boolean"}, b={"type": "integer", "maximum": 9}, c={"type": "string", "maxLength": 3}
    ),
    "nullable": schema(
        "a", "b", "c",
        a={"type": ["string", "null"]},
        b={"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
        c={"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}], "default": None},
        d={"type": ["integer", "null"]},
    ),
    "nested": schema(
        "tags",
        tags={"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        place={"$ref": "#/$defs/place"},
        unit={"$ref": "#/$defs/unit"},
    ),
    "any": schema("x", x={"type": "array", "maxItems": 2}, y={"type": "object"}),
    "none": schema(),
}  # fmt: skip


class Walk:
    """Chooses tokens at random among those that the grammar of a job allows."""

    def __init__(self, name: str) -> None:
        template, special = FORMATS[name]
        self.tokenizer = tokenizer(template, special)
        if "<|call|>" in special:
            # <|end|> ends a message, and not an answer
            self.tokenizer.eos_token = "<|call|>"
        self.format = AnswerFormat(self.tokenizer)
        texts = (
            "\n</parameter>",
            "</parameter>",
            "\n</function>",
            "</arg_value>",
            "</｜DSML｜parameter>",
            "</think>",
            "<|end|>",
            "<|call|>",
            '<|"|>',
            "<escape>",
            "<channel|>",
        )
        own = [text for text in texts if text in template]
        self.marks = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in own]
        self.end = self.tokenizer.eos_token_id
        self.compiler = GrammarCompiler(self.tokenizer, len(self.tokenizer), frozenset([self.end]))

    def grammar(self, made: ChatJob) -> Grammar:
        wanted = self.format.constraint(made)
        assert wanted is not None
        return self.compiler.compile(wanted, "tiny", self.format.before_content(made, ""))

    def allowed(self, grammar: Grammar) -> list[int]:
        bits = np.unpackbits(np.frombuffer(grammar.matcher.compute_bitmask(), np.uint8), bitorder="little")
        return [int(token) for token in bits[: len(self.tokenizer)].nonzero()[0]]

    def take(self, grammar: Grammar, seed: int, start: str = "", end: float = 0.3) -> list[int]:
        """Return tokens that begin with `start`, until the grammar's end or LONGEST."""
        tokens = self.tokenizer(start, add_special_tokens=False)["input_ids"]
        for token in tokens:
            assert not grammar.accept(token)
        chance = random.Random(seed)
        wish: list[int] = []
        stopped = False
        while not stopped and len(tokens) < LONGEST:
            allowed = self.allowed(grammar)
            if not wish and chance.random() < 0.15:
                # a mark, perhaps a part of it: nothing else ends a text
                wish = list(chance.choice(self.marks))
                wish = wish[: len(wish) if chance.random() < 0.7 else chance.randrange(len(wish))]
            if wish and wish[0] in allowed:
                token = wish.pop(0)
            else:
                wish, token = [], chance.choice(allowed)
            if self.end in allowed and chance.random() < end:
                token = self.end
            stopped = grammar.accept(token)
            tokens += [token] * (token != self.end)
        return tokens

    def read(self, tokens: list[int], made: ChatJob, cut: bool = False) -> Answer:
        detokenizer = self.format.detokenizer(Vocabulary.of(self.tokenizer), made)
        parser = self.format.parser(made, "")
        assert parser is not None
        return feed(parser, [detokenizer.add(token)[0] for token in tokens], cut)


walk_of = lru_cache(Walk)


def tools(*names: str) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "parameters": json.loads(json.dumps(SCHEMAS[name]))}}
        for name in names
    ]
    return {"tools": made, "strict_tools": list(names)}


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("format", FORMATS)
def test_required_calls_are_read_as_calls_that_fit(format, name):
    walk = walk_of(format)
    made = job(**tools(name), required_tools=[name], parallel_tool_calls=False)
    grammar = walk.grammar(made)
    complete = 0
    for seed in range(10):
        tokens = walk.take(grammar.copy(), seed)
        if len(tokens) == LONGEST:
            assert not walk.read(tokens, made, cut=True).content
            continue
        answer = walk.read(tokens, made)
        check(answer.parsed)
        assert answer.content == "" and len(answer.calls) == 1, walk.tokenizer.decode(tokens)
        complete += 1
    assert complete >= 3


@pytest.mark.parametrize("format", FORMATS)
def test_several_calls_and_names(format):
    walk = walk_of(format)
    names = ("choices", "none")
    made = job(**tools(*names), required_tools=list(names))
    grammar = walk.grammar(made)
    counts = set()
    for seed in range(30):
        tokens = walk.take(grammar.copy(), seed)
        if len(tokens) < LONGEST:
            answer = walk.read(tokens, made)
            check(answer.parsed)
            assert answer.content == ""
            counts.add(len(answer.calls))
    assert counts == {1} if format == "gpt-oss" else {1, 2} <= counts


@pytest.mark.parametrize("format", FORMATS)
def test_a_strict_call_in_a_free_answer_is_right(format):
    walk = walk_of(format)
    made = job(**tools("short", "none"))
    grammar = walk.grammar(made)
    beside = "" if format == "gpt-oss" else "Let me <look>.\n"
    found = 0
    for seed in range(10):
        for start in ("", beside + TURNS[format]):
            tokens = walk.take(grammar.copy(), seed, start)
            if len(tokens) < LONGEST:
                answer = walk.read(tokens, made)
                check(answer.parsed)
                assert len(answer.calls) >= (start != "")
                assert not start or answer.content.startswith(beside.strip())
                found += len(answer.calls)
    assert found >= 5


@pytest.mark.parametrize("format", FORMATS)
def test_a_free_answer_may_be_any_text(format):
    walk = walk_of(format)
    text = "Hello <there>!\n\nIt's [1, {2}], a < b, </b> \x7f and <|x|>. "
    prefix = "<|channel|>final<|message|>" if format == "gpt-oss" else ""
    made = job(**tools("short"))
    grammar = walk.grammar(made)
    tokens = walk.tokenizer(prefix + text, add_special_tokens=False)["input_ids"]
    assert not any(grammar.accept(token) for token in tokens)
    assert walk.end in walk.allowed(grammar)
    assert walk.read(tokens, made).content == text


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_of_the_answer_allows_calls_and_json(format):
    walk = walk_of(format)
    wanted = OutputFormat(kind="json_schema", text=json.dumps(PLACE), param="response_format")
    made = job(**tools("none"), output_format=wanted, parallel_tool_calls=False)
    grammar = walk.grammar(made)
    kinds = set()
    for seed in range(20):
        tokens = walk.take(grammar.copy(), seed)
        if len(tokens) == LONGEST:
            continue
        answer = walk.read(tokens, made)
        check(answer.parsed)
        if not answer.calls:
            jsonschema.validate(json.loads(answer.content), PLACE)
        kinds.add(len(answer.calls))
    assert kinds == {0, 1}


def own_tool(parameters: Any, strict: bool) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "own", "parameters": parameters}}
    return {"tools": [tool], "strict_tools": ["own"] * strict, "required_tools": ["own"]}


def a(**value: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": value, "b": {"type": "boolean"}}, "required": ["a", "b"]}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (a(type="string", pattern="^x"), "bounds of its length"),
        (a(type=["string", "integer"]), "not both"),
        (a(), "not both"),
        (a(enum=["null", "x"], type=["string", "null"]), "reads the same"),
        (a(enum=["</arg_value>", "</parameter>"]), "a mark"),
        (
            a(anyOf=[{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 5}]),
            "several schemas",
        ),
        ({**a(type="null"), "minProperties": 1}, "room for properties"),
        ({**a(type="null"), "required": ["c"]}, "required name"),
        ({"type": "object", "properties": {"<a>": {"type": "null"}}}, "names of properties"),
        ({"type": "array"}, 'the type "object"'),
    ],
)
@pytest.mark.parametrize("format", ["glm", "qwen3 coder"])
def test_what_the_notation_cannot_express_is_refused_if_strict_and_else_anything(format, parameters, words):
    walk = walk_of(format)
    with pytest.raises(InvalidRequest, match=words) as caught:
        walk.grammar(job(**own_tool(parameters, strict=True)))
    assert caught.value.param == "tools.0.function.parameters"
    made = job(**own_tool(parameters, strict=False))
    grammar = walk.grammar(made)
    for seed in range(3):
        tokens = walk.take(grammar.copy(), seed)
        assert len(tokens) == LONGEST or walk.read(tokens, made).calls


def test_a_string_in_quotes_stays_one_where_it_may_be_a_number():
    walk = walk_of("gpt-oss")
    either = {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string"}]}
    made = job(**own_tool({"type": "object", "properties": {"a": either}, "required": ["a"]}, strict=True))
    text = '<|channel|>commentary to=functions.own <|constrain|>json<|message|>{"a": "5"'
    tokens = walk.take(walk.grammar(made), 0, text)
    (answer,) = walk.read(tokens, made).parsed
    assert answer == ("own", {"a": "5"})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (a(type="string", pattern="^x"), "bounds of its length"),
        (a(enum=["x", 1]), "some are text"),
        (a(type="array", items={"type": "string", "format": "date"}), "bounds of its length"),
        (a(type="array", prefixItems=[{"type": "null"}]), "bounds of their number"),
        (a(enum=['<|"|>']), "a mark"),
        (a(oneOf=[{"type": "string"}, {"type": "string", "minLength": 2}, {"type": "array"}]), "oneOf"),
        ({"type": "object", "properties": {"a-b": {"type": "null"}}}, "names of properties"),
    ],
)
def test_what_gemma_cannot_express_is_refused_if_strict_and_else_anything(parameters, words):
    walk = walk_of("gemma with tokens")
    with pytest.raises(InvalidRequest, match=words) as caught:
        walk.grammar(job(**own_tool(parameters, strict=True)))
    assert caught.value.param == "tools.0.function.parameters"
    made = job(**own_tool(parameters, strict=False))
    grammar = walk.grammar(made)
    for seed in range(3):
        tokens = walk.take(grammar.copy(), seed)
        assert len(tokens) == LONGEST or walk.read(tokens, made).calls


def test_definitions_that_refer_to_each_other_many_times_are_followed_once():
    """One after the other there would be 10 ** 30 ways through them."""
    many = {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 10} for at in range(30)}
    deep = {"$defs": {**many, "d30": {"type": "string"}}, **a(**{"$ref": "#/$defs/d0"})}
    for format in ("glm", "gemma"):
        with pytest.raises(InvalidRequest):
            walk_of(format).grammar(job(**own_tool(deep, strict=True)))
        made = job(**own_tool(deep, strict=False))
        walk_of(format).grammar(made)
        assert walk_of(format).format.parser(made, "") is not None


def test_a_definition_may_refer_to_itself_in_gemmas_notation():
    walk = walk_of("gemma with tokens")
    node = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"type": "boolean"}}}
    parameters = {"$defs": {"n": {**node, "required": ["b"]}}, **a(**{"$ref": "#/$defs/n"})}
    made = job(**own_tool(parameters, strict=True))
    grammar = walk.grammar(made)
    for seed in range(5):
        tokens = walk.take(grammar.copy(), seed)
        if len(tokens) < LONGEST:
            jsonschema.validate(walk.read(tokens, made).parsed[0][1], parameters)
    text = "<|tool_call>call:own{a:{a:{b:true},b:false},b:true}<tool_call|>"
    tokens = walk.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [grammar.accept(token) for token in tokens][:-1] == [False] * (len(tokens) - 1)
    assert walk.read(tokens, made).parsed == [("own", {"a": {"a": {"b": True}, "b": False}, "b": True})]
