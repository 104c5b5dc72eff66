"""Structured output: what random models write at a high temperature has the format that was asked for."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import datetime, time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from protocol.jobs import ChatJob, OutputFormat
from tests.engines.tiny_chat import CONFIGS, VOCABULARY, Collector, chat_job, make_engine, run, save_model
from tests.engines.tiny_sentencepiece import save_sentencepiece_model, train
from workers.engines.chat import ChatEngine
from workers.engines.chat.grammar import compiler, sources, threads
from workers.engines.chat.grammar.ends import exclude
from workers.engines.chat.grammar.filler import MaskFiller, MaskThreads, PendingMasks
from workers.engines.chat.grammar.matcher import Grammar
from workers.engines.chat.pipeline import DecodePipeline

TEXT = {"type": "string", "maxLength": 6}
INTEGER = {"type": "integer"}
SMALL = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(**properties: Any) -> dict[str, Any]:
    """A schema of objects with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: Any, most: int = 4, **rest: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **rest}


SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer with bounds": {"type": "integer", "minimum": -20, "maximum": 120},
    "integer with exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 17},
    "number with bounds": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "multiple of an integer": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "multiple of a fraction": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
    "string with lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "several types": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
    "enum of strings": {"enum": ["red", "green", "quick brown", 'with "quotes"', "naïve"]},
    "enum of all types": {"enum": [1, -2.5, None, True, "x", [1, 2], {"a": [False]}]},
    "const": {"const": {"kind": "fox", "legs": 4, "tags": ["quick", None]}},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
    "pattern without anchors": {"type": "string", "pattern": "[0-9]x", "maxLength": 8},
    "pattern with alternatives": {"type": "string", "pattern": "^(the|lazy|dog)( fox){0,2}$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "time": {"type": "string", "format": "time"},
    "date with a pattern": {"type": "string", "format": "date", "pattern": "^(19|20)"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "email": {"type": "string", "format": "email"},
    "array with bounds": array(SMALL, 5, minItems=2),
    "array of arrays": array(array({"type": "boolean"}, 2), 3, minItems=1),
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, TEXT, SMALL],
        "items": False,
        "minItems": 3,
    },
    "tuple and more": {
        "type": "array",
        "prefixItems": [{"type": "null"}],
        "items": SMALL,
        "minItems": 1,
        "maxItems": 4,
    },
    "object": closed(name=TEXT, age=SMALL, ok={"type": "boolean"}),
    "optional properties": {**closed(a=TEXT, b=SMALL, c={"type": "boolean"}), "required": ["b"]},
    "no properties": {"type": "object", "additionalProperties": False},
    "additional properties": {
        "type": "object",
        "properties": {"a": SMALL},
        "additionalProperties": {"type": "boolean"},
    },
    "required without a schema": {"type": "object", "required": ["fox"], "additionalProperties": SMALL},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n[0-9]{1,3}$": SMALL},
        "additionalProperties": False,
    },
    "numbers of properties": {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 2,
        "additionalProperties": {"type": "boolean"},
    },
    "nested objects": closed(
        user=closed(name=TEXT, home=closed(zip={"type": "string", "pattern": "^[0-9]{5}$"}))
    ),
    "definitions": {
        "$defs": {"point": closed(x=SMALL, y=SMALL)},
        **closed(start={"$ref": "#/$defs/point"}, others=array({"$ref": "#/$defs/point"}, 2)),
    },
    "definitions of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"a": {"enum": ["one", "two"]}},
        "title": "a title",
        **closed(pick={"$ref": "#/definitions/a", "description": "one of two"}),
    },
    "recursive": {
        "$defs": {"node": closed(v=SMALL, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    "anyOf": {"anyOf": [closed(kind={"const": "a"}, n=SMALL), closed(kind={"const": "b"}, t=TEXT), INTEGER]},
    "oneOf of different types": {"oneOf": [{"type": "boolean"}, TEXT]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
    },
    "any object": {"type": "object"},
    "anything": {},
    "const text": {"const": 'with "quotes" and a \\'},
    "const null": {"const": None},
    "enum within a type": {"type": "string", "enum": ["one", "two", "three"]},
    "negative integers": {"type": "integer", "minimum": -500, "maximum": -20},
    "one number": {"type": "integer", "minimum": 5, "maximum": 5},
    "number with exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "even and small": {"type": "integer", "multipleOf": 2, "exclusiveMinimum": 10, "maximum": 30},
    "empty text": {"type": "string", "maxLength": 0},
    "one character": {"type": "string", "minLength": 1, "maxLength": 1},
    "pattern with lengths": {"type": "string", "pattern": "^[xyz]+$", "minLength": 3, "maxLength": 6},
    "empty array": {"type": "array", "maxItems": 0},
    "array of an enum": array({"enum": ["a", "b", None]}, 4, minItems=1),
    "array of objects": array(closed(id=SMALL, ok={"type": "boolean"}), 2, minItems=1),
    "object that may be null": {"anyOf": [{"type": "null"}, closed(a=SMALL, b=closed(c=TEXT))]},
    "reference beside keywords": {
        "$defs": {"positive": {"type": "integer", "minimum": 1}},
        **closed(n={"$ref": "#/$defs/positive", "maximum": 99}),
    },
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": SMALL, "b": {"type": "boolean"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
}


def schema_job(id: str, schema: dict[str, Any], **sampling: Any) -> ChatJob:
    return format_job(id, "json_schema", json.dumps(schema), **sampling)


def format_job(id: str, kind: Any, text: str, **sampling: Any) -> ChatJob:
    job = chat_job(id, **{"temperature": 1.5, "max_tokens": 300, **sampling})
    return msgspec.structs.replace(
        job, output_format=OutputFormat(kind=kind, text=text, param="response_format")
    )


def check(schema: dict[str, Any], text: str) -> None:
    """Fail unless the text is JSON that the schema allows."""
    value = json.loads(text)
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)
    if schema.get("format") == "date-time":
        datetime.fromisoformat(value)
    if schema.get("format") == "time":
        time.fromisoformat(value)
    # no whitespace between the parts of JSON
    assert not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text))


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def served(request, tmp_path_factory) -> Iterator[tuple[ChatEngine, Collector]]:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "byte-level":
        save_model(folder, CONFIGS["llama"]())
    else:
        save_sentencepiece_model(folder, train("bpe"))
    engine, collector = make_engine(folder, max_batch_size=64)
    yield engine, collector
    engine.close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def closing(engine: ChatEngine) -> dict[int, float]:
    """A bias towards the tokens that end a text, which a random model seldom chooses."""
    vocabulary = engine.parts.prompts.vocabulary
    wanted = (b'"', b"}", b"]", b'"}', b'"]')
    return {token: 4.0 for token in vocabulary.pieces if vocabulary.token_bytes(token) in wanted}


def test_every_answer_is_valid(served):
    engine, collector = served
    bias = closing(engine)
    jobs = {
        f"{name} {seed}": (schema, schema_job(f"{name} {seed}", schema, seed=seed, n=2, logit_bias=bias))
        for name, schema in SCHEMAS.items()
        for seed in range(10)
    }
    results = run(engine, collector, [job for _, job in jobs.values()])
    ended: dict[str, int] = {}
    for (schema, job), result in zip(jobs.values(), results, strict=True):
        for index in range(2):
            if result.finish(index)[0] == "stop":
                check(schema, result.text(index))
                ended[job.id[:-2]] = ended.get(job.id[:-2], 0) + 1
    # the rest were cut off by max_tokens
    assert ended.keys() == SCHEMAS.keys()
    assert sum(ended.values()) > 17 * len(SCHEMAS), ended


def test_all_options_of_sampling_go_with_it(weights):
    """Plain and in a batch, with n, logprobs, penalties, a bias, stop tokens, and with drafts in the
    engine."""
    schema = SCHEMAS["nested objects"]
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"n": 3},
        {"logprobs": 3, "n": 2},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": dict.fromkeys(range(20, 60), -100.0)},
        {"min_tokens": 250},
        {"ignore_eos": True},
    ]
    jobs = [schema_job(f"o{at}", schema, seed=at, **option) for at, option in enumerate(options)]
    # what an n-gram was followed by before, so that there are drafts
    again = array(closed(fox=TEXT, brown={"const": "quick"}), 9, minItems=9)
    jobs.append(schema_job("again", again, seed=1))
    free = chat_job("free", max_tokens=60, ignore_eos=True, temperature=0.7, seed=1)
    texts = []
    for engine_options in ({}, {"num_speculative_tokens": 6}, {"max_batch_size": 2, "prefix_cache": False}):
        engine, collector = make_engine(weights, **engine_options)
        try:
            *results, unbound = run(engine, collector, [*jobs, free])
        finally:
            engine.close()
        for job, result in zip(jobs, results, strict=True):
            for index in range(job.sampling.n):
                # without a token to end, nothing can follow
                assert result.finish(index) == ("stop", None)
                check(again if job.id == "again" else schema, result.text(index))
                if job.sampling.logprobs is not None:
                    logprobs = [entry for delta in result.deltas(index) for entry in delta.logprobs or []]
                    assert len(logprobs) == sum(delta.tokens for delta in result.deltas(index))
        texts.append([r.text(i) for r, j in zip(results, jobs, strict=True) for i in range(j.sampling.n)])
        assert unbound.usage.completion_tokens == 60
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0][1:4])) == 3


def test_preempted_answers_go_on_unchanged(weights):
    schema = closed(items=array(SCHEMAS["nested objects"], 3, minItems=3))
    jobs = [schema_job(f"p{at}", schema, seed=at, n=1 + at % 2, max_tokens=250) for at in range(12)]
    texts = []
    for tokens in (None, 600):
        engine, collector = make_engine(weights, kv_cache_tokens=tokens, max_batch_size=16)
        try:
            results = run(engine, collector, jobs)
        finally:
            engine.close()
        assert (engine.metrics.preemptions > 0) == (tokens is not None)
        texts.append(
            [
                (r.text(i), r.finish(i))
                for r, j in zip(results, jobs, strict=True)
                for i in range(j.sampling.n)
            ]
        )
    assert texts[0] == texts[1]
    for text, finish in texts[0]:
        assert finish[0] == "stop"
        check(schema, text)


def test_an_answer_that_is_cut_off_says_so(weights):
    engine, collector = make_engine(weights)
    try:
        cut, stopped, cancelled = [
            schema_job("cut", array(SMALL, 200, minItems=200), max_tokens=9),
            schema_job("stopped", array(SMALL, 200, minItems=200), stop=("1,",), seed=3),
            schema_job("cancelled", array(SMALL, 10**6, minItems=10**6), max_tokens=900),
        ]
        engine.submit(cancelled)
        collector.wait_first("cancelled")
        engine.cancel("cancelled", "deadline")
        assert collector.result("cancelled").finish()[0] == "length"
        results = run(engine, collector, [cut, stopped])
        assert results[0].finish() == ("length", None) and results[0].usage.completion_tokens == 9
        assert re.fullmatch(r"\[([0-9],?)+", results[0].text())
        # the client's own stop string cuts JSON off too, and is named
        assert results[1].finish() == ("stop", "1,")
        assert re.fullmatch(r"\[([02-9],)*", results[1].text())
    finally:
        engine.close()


def test_a_complete_answer_ends_with_max_tokens_to_spare_or_not(weights):
    engine, collector = make_engine(weights)
    try:
        (free,) = run(engine, collector, [schema_job("a", {"const": "the fox"})])
        tokens = free.usage.completion_tokens
        exact, short = run(
            engine,
            collector,
            [
                schema_job("b", {"const": "the fox"}, max_tokens=tokens),
                schema_job("c", {"const": "the fox"}, max_tokens=tokens - 1),
            ],
        )
        assert free.finish() == exact.finish() == ("stop", None)
        assert free.text() == exact.text() == '"the fox"'
        assert short.finish() == ("length", None)
        # a text that is complete and may go on ends by an end token
        (word,) = run(engine, collector, [format_job("d", "regex", "[a-z]+", logit_bias={0: 100.0})])
        assert word.finish() == ("stop", 0)
        assert re.fullmatch("[a-z]+", word.text())
    finally:
        engine.close()


def test_a_text_that_becomes_too_complex_ends_its_request_and_no_other(weights):
    engine, collector = make_engine(weights)
    try:
        grammar = 'start: s\ns: s s s | s s | "a" | "aa"'
        good = schema_job("good", SCHEMAS["nested objects"], seed=1)
        bad = format_job("bad", "grammar", grammar, max_tokens=900, n=2, logit_bias={0: -100.0})
        refused = format_job("refused", "regex", "a(?=b)")
        (expected,) = run(engine, collector, [msgspec.structs.replace(good, id="alone")])
        result, failed, free, early = run(
            engine, collector, [good, bad, chat_job("free", max_tokens=200, ignore_eos=True), refused]
        )
        assert (failed.failed.code, failed.failed.param) == ("invalid_request", "response_format")
        assert "too complex" in failed.failed.message
        assert (early.failed.code, early.failed.param) == ("invalid_request", "response_format")
        assert result.text() == expected.text()
        assert free.usage.completion_tokens == 200
        assert engine.parts.cache.num_active == 0
    finally:
        engine.close()


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust."""


class PanickingMatcher:
    def consume_token(self, token: int) -> bool:
        raise PanicException("Sesame")


@pytest.mark.parametrize("place", ["token", "mask"])
def test_a_panic_ends_its_request_and_no_other(weights, place, monkeypatch):
    engine, collector = make_engine(weights)
    start, accept = MaskFiller.start, Grammar.accept
    grammars: list[Grammar | None] = []
    panicking: Any = PanickingMatcher()
    build = engine.parts.prompts.build

    def noted(job: ChatJob, cancelled: Any) -> Any:
        request = build(job, cancelled)
        grammars.extend(row.grammar for row in request.sequences if job.id == "bad")
        return request

    def panicking_accept(grammar: Grammar, token: int) -> bool:
        if grammar in grammars:
            grammar._matcher = panicking
        return accept(grammar, token)

    def panicking_start(filler: MaskFiller, rows: Any) -> PendingMasks | None:
        rows = list(rows)
        if not any(row.grammar in grammars for row in rows if row.output and row.grammar is not None):
            return start(filler, rows)
        pending = PendingMasks([], np.zeros((0, 1), np.int32), MaskThreads(1))
        pending.unfilled = Future()
        pending.unfilled.set_exception(PanicException("Sesame"))
        return pending

    monkeypatch.setattr(engine.parts.prompts, "build", noted)
    if place == "token":
        monkeypatch.setattr(Grammar, "accept", panicking_accept)
    else:
        monkeypatch.setattr(MaskFiller, "start", panicking_start)
    try:
        good, bad = (
            schema_job("good", array(SMALL, 9, minItems=9)),
            schema_job("bad", array(SMALL, 9, minItems=9)),
        )
        result, failed = run(engine, collector, [good, bad])
        assert failed.failed.code == "engine_error" and "Sesame" not in failed.failed.message
        assert len(json.loads(result.text())) == 9
        assert engine.parts.cache.num_active == 0
    finally:
        engine.close()


def test_a_request_ends_when_it_is_cancelled_while_its_grammar_is_compiled(weights, monkeypatch):
    engine, collector = make_engine(weights)
    source, compiling, go = sources.source_of_format, threading.Event(), threading.Event()

    def waits(wanted: OutputFormat) -> dict[str, Any]:
        compiling.set()
        go.wait(60)
        return source(wanted)

    monkeypatch.setattr(compiler, "source_of_format", waits)
    monkeypatch.setattr(threads, "LIMIT_S", 60)
    submitting = threading.Thread(target=engine.submit, args=[schema_job("gone", SMALL)])
    try:
        submitting.start()
        assert compiling.wait(60)
        engine.cancel("gone", "cancelled")
        assert collector.result("gone").failed.code == "cancelled" and not go.is_set()
    finally:
        go.set()
        submitting.join(60)
        engine.close()


def test_a_stream_goes_on_while_a_grammar_is_compiled(weights, monkeypatch):
    """Whatever a compilation takes, no step waits for it: neither of a running request nor of a new one."""
    engine, collector = make_engine(weights)
    source, compiling, go = sources.source_of_format, threading.Event(), threading.Event()

    def waits(wanted: OutputFormat) -> dict[str, Any]:
        compiling.set()
        assert go.wait(30)
        return source(wanted)

    monkeypatch.setattr(compiler, "source_of_format", waits)
    monkeypatch.setattr(threads, "LIMIT_S", 60)
    submitting = threading.Thread(target=engine.submit, args=[schema_job("slow", SMALL)])
    try:
        engine.submit(chat_job("running", max_tokens=400, ignore_eos=True))
        collector.wait_first("running")
        submitting.start()
        assert compiling.wait(60)
        engine.submit(chat_job("new", max_tokens=20, ignore_eos=True))
        assert collector.result("new").usage.completion_tokens == 20
        assert collector.result("running").usage.completion_tokens == 400
        assert not go.is_set()
        go.set()
        assert json.loads(collector.result("slow").text()) in range(10)
    finally:
        go.set()
        submitting.join(60)
        engine.close()


def test_steps_with_a_grammar_are_not_launched_before_their_tokens_are_read(weights):
    """The others are, and all texts are those of an engine that never does it."""
    jobs = [schema_job(f"s{at}", SCHEMAS["nested objects"], seed=at) for at in range(3)]
    jobs += [chat_job(f"f{at}", max_tokens=150, ignore_eos=True, temperature=0.9, seed=at) for at in range(3)]
    texts: list[list[str]] = []
    launched: list[Any] = []
    for pipelined in (False, True):
        engine, collector = make_engine(weights)
        try:
            if pipelined:
                parts = engine.parts
                parts.pipeline = DecodePipeline(parts.cache, parts.scheduler, parts.runner, parts.sampler)
                launch = parts.pipeline.launch

                def counted(batch, launch=launch):
                    launched.extend(sequence.grammar for sequence in batch.decode)
                    return launch(batch)

                parts.pipeline.launch = counted  # type: ignore[method-assign]
            texts.append([result.text() for result in run(engine, collector, jobs)])
        finally:
            engine.close()
    assert set(launched) == {None}
    assert texts[0] == texts[1]


def test_rows_without_a_grammar_fill_no_masks(weights, monkeypatch):
    filled: list[int] = []
    fill = MaskThreads.fill

    def counted(threads, rows, bits):
        filled.append(len(rows))
        fill(threads, rows, bits)

    monkeypatch.setattr(MaskThreads, "fill", counted)
    engine, collector = make_engine(weights)
    try:
        run(engine, collector, [chat_job("free")])
        assert filled == []
        (result,) = run(engine, collector, [format_job("guided", "regex", "[0-9]{20}")])
        assert re.fullmatch("[0-9]{20}", result.text())
        assert set(filled) == {1}
    finally:
        engine.close()


def test_masks_are_filled_while_the_model_computes(weights):
    engine, collector = make_engine(weights)
    filled = threading.Event()
    try:
        parts = engine.parts
        start, forward = parts.masks.start, parts.runner.forward
        overlaps = 0

        def started(sequences):
            pending = start(sequences)
            if pending is not None and pending.unfilled is not None:
                pending.unfilled.add_done_callback(lambda _: filled.set())
            return pending

        def waits_for_the_mask(chunks):
            nonlocal overlaps
            if len(chunks) == 1 and len(chunks[0].tokens) == 1:
                assert filled.wait(60)
                filled.clear()
                overlaps += 1
            return forward(chunks)

        parts.masks.start = started  # type: ignore[method-assign]
        parts.runner.forward = waits_for_the_mask  # type: ignore[method-assign, assignment]
        (result,) = run(engine, collector, [format_job("a", "regex", "[0-9]{20}")])
        assert re.fullmatch("[0-9]{20}", result.text())
        assert overlaps > 5
    finally:
        engine.close()


def test_a_model_with_padded_logits_and_several_end_tokens(tmp_path):
    """The embedding has more rows than the tokenizer has tokens; a token of the config ends answers too."""
    weights = save_model(tmp_path, CONFIGS["llama"]())
    config = json.loads((weights / "generation_config.json").read_text())
    (weights / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [0, 1]}))
    engine, collector = make_engine(weights)
    try:
        assert engine.parts.prompts.grammars.words == VOCABULARY // 32
        for end, bias in ((0, {0: 100.0}), (1, {1: 100.0})):
            (result,) = run(engine, collector, [format_job(f"e{end}", "regex", "ab?", logit_bias=bias)])
            assert result.finish() == ("stop", end) and result.text() == "a"
    finally:
        engine.close()


def test_end_tokens_wait_for_min_tokens_and_ignore_eos_where_a_text_may_go_on(weights):
    engine, collector = make_engine(weights)
    ending: dict[str, Any] = {"logit_bias": {0: 100.0}, "max_tokens": 40}
    try:
        at_once, later, never, forced = run(
            engine,
            collector,
            [
                format_job("a", "regex", "[a-z]*", **ending),
                format_job("b", "regex", "[a-z]*", **ending, min_tokens=9),
                format_job("c", "regex", "[a-z]*", **ending, ignore_eos=True),
                format_job("d", "regex", "[a-z]?", **ending, min_tokens=9, ignore_eos=True),
            ],
        )
        assert (at_once.text(), at_once.finish()) == ("", ("stop", 0))
        assert (later.finish(), later.usage.completion_tokens) == (("stop", 0), 10)
        assert (never.finish(), never.usage.completion_tokens) == (("length", None), 40)
        assert forced.finish() == ("stop", None) and forced.usage.completion_tokens == 1
    finally:
        engine.close()


def test_tokens_are_removed_from_a_mask_that_allows_others():
    mask = np.array([-1, 0, -1], np.int32)
    exclude(mask, frozenset([0, 31, 95]))
    assert mask.view(np.uint32).tolist() == [0x7FFFFFFE, 0, 0x7FFFFFFF]
    only = np.array([1, 0, -(2**31)], np.int32)
    exclude(only, frozenset([0, 95, 40]))
    assert only.tolist() == [1, 0, -(2**31)]
