"""Structured output of models that reason: the format is that of the content."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from protocol.events import ReasoningDelta
from protocol.jobs import ChatJob, OutputFormat
from tests.engines import chat_templates as templates
from tests.engines.tiny_chat import CONFIGS, Result, chat_job, make_engine, run, save_model
from tests.scripted_chat import save_scripted_model
from workers.engines.chat.sampling.sampler import Samples

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TAGS = ["<think>", "</think>"]
SCRIPTS = {"think": '<think>\nIt is {"b": 1}.\n</think>\n\n{"a":4}', "plain": '{"a":5}'}
OPENING = (
    "{%- for message in messages -%}<|{{- message['role'] }}|>"
    "{%- if message.reasoning_content -%}<think>\n{{ message.reasoning_content }}\n</think>\n\n{%- endif -%}"
    "{{- message['content'] -}}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|><think>\n"
    "{%- if not enable_thinking | default(true) -%}\n</think>\n\n{%- endif -%}{%- endif -%}"
)


def structured(job: ChatJob, kind: Any = "json_schema", text: str = json.dumps(SCHEMA)) -> ChatJob:
    return msgspec.structs.replace(
        job, output_format=OutputFormat(kind=kind, text=text, param="response_format")
    )


def reasoning(result: Result) -> str:
    return "".join(event.text for event in result.events if isinstance(event, ReasoningDelta))


@pytest.mark.parametrize("special", [[], TAGS], ids=["tags of text", "tags of special tokens"])
def test_reasoning_comes_before_the_format_or_is_left_out(tmp_path, special):
    engine, collector = make_engine(save_scripted_model(tmp_path, templates.QWEN3, SCRIPTS, special))
    try:
        jobs = [structured(chat_job(name, name, max_tokens=200)) for name in SCRIPTS]
        thought, plain = run(engine, collector, jobs)
        assert (reasoning(thought), reasoning(plain)) == ('It is {"b": 1}.', "")
        assert json.loads(thought.text())["a"] in range(10)
        assert json.loads(plain.text())["a"] in range(10)
        assert thought.finish() == plain.finish() == ("stop", None)
        assert thought.usage.reasoning_tokens > 0
    finally:
        engine.close()


@pytest.fixture
def weights(tmp_path) -> Path:
    """A random model whose prompts end inside its reasoning, and whose tags are added tokens."""
    folder = save_model(tmp_path, CONFIGS["llama"]())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(TAGS)
    tokenizer.chat_template = OPENING
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_that_the_prompt_begins_in_its_reasoning(weights):
    engine, collector = make_engine(weights)
    closing = AutoTokenizer.from_pretrained(weights).convert_tokens_to_ids("</think>")
    sampling: dict[str, Any] = {"temperature": 1.5, "max_tokens": 400, "logit_bias": {closing: 8.0}}
    try:
        jobs = [structured(chat_job(f"t{at}", seed=at, **sampling)) for at in range(20)]
        jobs += [
            structured(chat_job(f"c{at}", seed=at, **sampling), "choice", '["yes", "no"]') for at in range(5)
        ]
        jobs += [
            msgspec.structs.replace(job, id=f"off {job.id}", chat_template_kwargs={"enable_thinking": False})
            for job in jobs[:5]
        ]
        results = run(engine, collector, jobs)
        thoughts = 0
        for job, result in zip(jobs, results, strict=True):
            assert result.finish() == ("stop", None)
            if job.id.startswith("c"):
                assert result.text() in ("yes", "no")
            else:
                assert json.loads(result.text())["a"] in range(10)
            if job.id.startswith("off"):
                assert result.usage.reasoning_tokens == 0
            thoughts += bool(reasoning(result))
        assert thoughts > 10
        # there is no end before the content
        (cut,) = run(
            engine,
            collector,
            [structured(chat_job("cut", max_tokens=30, logit_bias={0: 100.0, closing: -100.0}))],
        )
        assert cut.finish() == ("length", None) and cut.text() == ""
    finally:
        engine.close()


def test_a_closing_tag_of_ordinary_tokens_ends_the_request(weights, monkeypatch):
    """The rest of the text would be content, and the grammar takes it for reasoning."""
    engine, collector = make_engine(weights)
    try:
        vocabulary = engine.parts.prompts.vocabulary
        tokens = {vocabulary.token_bytes(token): token for token in vocabulary.pieces}
        spelled = iter([tokens[bytes([byte])] for byte in b"hm</think>no"])
        monkeypatch.setattr(engine.parts.sampler, "sample", lambda *_: Samples([next(spelled)], {}))
        (result,) = run(engine, collector, [structured(chat_job("a"))])
        assert result.failed.code == "engine_error"
        assert result.text() == ""
    finally:
        engine.close()


def test_a_model_whose_answers_have_channels_refuses_formats(tmp_path):
    weights = save_scripted_model(tmp_path, templates.GPT_OSS, {"a": "b"})
    engine, collector = make_engine(weights)
    try:
        (result,) = run(engine, collector, [structured(chat_job("a", "a"))])
        assert (result.failed.code, result.failed.param) == ("unsupported_parameter", "response_format")
    finally:
        engine.close()
