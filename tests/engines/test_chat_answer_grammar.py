"""Grammars of calls: whatever a model's tokens are, what comes out is read as right calls."""

import json
import random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from protocol.jobs import ChatJob
from tests.engines import chat_templates as templates
from tests.engines.test_chat_answer_calls import Answer, feed, job
from tests.engines.test_chat_answer_thinking import tokenizer
from workers.engines.chat.answer.call_format import derive
from workers.engines.chat.answer.call_grammar import CallableTool, CallGrammar
from workers.engines.chat.answer.format import AnswerFormat
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkTags
from workers.engines.chat.detokenizer import Vocabulary

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CALLABLE = [
    CallableTool(name, {**schema, "x-guidance": JSON})
    for name, schema in (("weather", WEATHER), ("now", NOW))
]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("weather", WEATHER), ("now", NOW))
]
LONGEST = 300

FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hermes": (templates.HERMES, ()),
    "qwen3": (templates.QWEN3, ("<tool_call>", "</tool_call>", "<think>", "</think>")),
    "llama 3.1": (templates.LLAMA_3_1, ()),
    "mistral nemo": (templates.MISTRAL_NEMO, ("[TOOL_CALLS]",)),
    "mistral small": (templates.MISTRAL_SMALL, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    "deepseek r1": (
        templates.DEEPSEEK_R1,
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    ),
    "kimi k2": (
        templates.KIMI_K2,
        (
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ),
    "command r7b": (templates.COMMAND_R7B, ("<|START_ACTION|>", "<|END_ACTION|>")),
}
"""Each with the control tokens that its tokenizer has."""


class Walk:
    """Chooses tokens at random among those that a grammar allows."""

    def __init__(self, name: str) -> None:
        template, special = FORMATS[name]
        self.tokenizer = tokenizer(template, special)
        self.format = AnswerFormat(self.tokenizer)
        probe = TemplateProbe(self.tokenizer)
        calls = derive(probe, ThinkTags.of(probe))
        assert calls is not None
        self.opening = calls.opening
        added = {token.content: at for at, token in self.tokenizer.added_tokens_decoder.items()}
        self.grammars = CallGrammar(calls, added)
        self.end = self.tokenizer.eos_token_id
        self._tokens = LLTokenizer(self.tokenizer.backend_tokenizer.to_str(), eos_token=[self.end])

    def matcher(self, source: str) -> LLMatcher:
        made = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(source), log_level=0)
        assert not made.is_error(), made.get_error()
        return made

    def allowed(self, matcher: LLMatcher) -> list[int]:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return [int(token) for token in bits[: len(self.tokenizer)].nonzero()[0]]

    def take(self, matcher: LLMatcher, seed: int, start: str = "") -> list[int]:
        """Return tokens that begin with `start`, until the grammar's end or LONGEST."""
        tokens = self.tokenizer(start, add_special_tokens=False)["input_ids"]
        assert all(matcher.consume_token(token) for token in tokens)
        chance = random.Random(seed)
        while not matcher.is_stopped() and len(tokens) < LONGEST:
            allowed = self.allowed(matcher)
            # without a model that wants to end, free text goes on
            token = self.end if self.end in allowed and chance.random() < 0.2 else chance.choice(allowed)
            assert matcher.consume_token(token)
            tokens += [token] * (token != self.end)
        return tokens

    def read(self, tokens: list[int], made: ChatJob) -> Answer:
        detokenizer = self.format.detokenizer(Vocabulary.of(self.tokenizer), made)
        parser = self.format.parser(made, "")
        assert parser is not None
        return feed(parser, [detokenizer.add(token)[0] for token in tokens])


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "weather":
            assert arguments.keys() == {"city", "unit"} and arguments["unit"] in ("C", "F")
        else:
            assert (name, arguments) == ("now", {})


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_right_calls_and_nothing_else(name, parallel):
    walk = Walk(name)
    made = job(tools=TOOLS, parallel_tool_calls=parallel)
    matcher = walk.matcher(walk.grammars.required(CALLABLE, parallel=parallel))
    counts = set()
    for seed in range(20):
        tokens = walk.take(matcher.deep_copy(), seed)
        if len(tokens) == LONGEST:
            continue
        answer = walk.read(tokens, made)
        check(answer.parsed)
        assert answer.content == "" and answer.calls
        counts.add(len(answer.calls))
    one = not parallel or name == "llama 3.1"
    assert counts == {1} if one else len(counts) > 1


@pytest.mark.parametrize("name", FORMATS)
def test_what_looks_like_a_call_in_a_free_answer_is_a_right_call(name):
    walk = Walk(name)
    matcher = walk.matcher(walk.grammars.free(CALLABLE, parallel=True))
    for seed in range(10):
        beside = "" if name == "llama 3.1" else "Let me look. "
        opening = walk.opening.strip() if walk.opening.strip() else "{"
        tokens = walk.take(matcher.deep_copy(), seed, beside + opening.split()[0])
        if len(tokens) == LONGEST:
            continue
        answer = walk.read(tokens, job(tools=TOOLS))
        check(answer.parsed)
        assert answer.calls and answer.content.startswith(beside.strip())


@pytest.mark.parametrize("name", FORMATS)
def test_a_free_answer_may_be_any_text(name):
    walk = Walk(name)
    for text in ("Hello <there>!\n\nIt's [1, {2}]. ", "x"):
        matcher = walk.matcher(walk.grammars.free(CALLABLE, parallel=True))
        tokens = walk.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert all(matcher.consume_token(token) for token in tokens)
        assert walk.end in walk.allowed(matcher)


def test_without_parallel_calls_a_free_answer_has_one_at_most():
    walk = Walk("mistral small")
    matcher = walk.matcher(walk.grammars.free(CALLABLE, parallel=False))
    call = "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"
    tokens = walk.tokenizer(call, add_special_tokens=False)["input_ids"]
    assert all(matcher.consume_token(token) for token in tokens)
    assert walk.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]") not in walk.allowed(matcher)


def test_names_are_those_of_the_tools():
    walk = Walk("hermes")
    text = walk.grammars.required(CALLABLE[1:], parallel=False)
    matcher = walk.matcher(text)
    answer = walk.read(walk.take(matcher, 0), job(tools=TOOLS))
    assert answer.calls == [("now", "{}")] and json.loads(answer.calls[0][1]) == {}
