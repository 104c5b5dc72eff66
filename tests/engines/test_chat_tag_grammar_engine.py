"""Calls that must be, by models of random weights whose families write them with tags or in channels."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from transformers import AutoTokenizer

from protocol.events import Delta, ReasoningDelta, ToolCallDelta
from protocol.jobs import ChatJob
from tests.engines.test_chat_answer_engine import calls
from tests.engines.test_chat_tag_grammar import FORMATS, SCHEMAS, TURNS, tools
from tests.engines.tiny_chat import CONFIGS, Collector, chat_job, make_engine, run, save_model
from workers.engines.chat import ChatEngine

Served = tuple[ChatEngine, Collector, dict[int, float]]
NAMES = ("choices", "optional", "nested")
THINK = ("<think>", "</think>")
ENDS = ("</think>", "</arg_value>", "<|end|>", '"', "]", "}", "<", '<|"|>')


@pytest.fixture(
    scope="module",
    params=["qwen3 coder with tokens", "glm with tokens", "dsml", "gemma with tokens", "gpt-oss"],
)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template, special = FORMATS[request.param]
    folder = save_model(tmp_path_factory.mktemp("model"), CONFIGS["llama"]())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *THINK]})
    tokenizer.chat_template = template
    if "<|call|>" in special:
        tokenizer.eos_token = "<|call|>"
        for file in ("config.json", "generation_config.json"):
            config = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**config, "eos_token_id": tokenizer.eos_token_id}))
    tokenizer.save_pretrained(folder)
    engine, collector = make_engine(folder, max_batch_size=32)
    known = tokenizer.get_vocab()
    # a random model seldom chooses what ends a text
    yield engine, collector, {known[text]: 6.0 for text in ENDS if text in known}
    engine.close()


def tool_job(id: str, bias: dict[int, float], names: tuple[str, ...], seed: int, **fields: Any) -> ChatJob:
    sampling = {"temperature": 1.5, "seed": seed, "logit_bias": bias, "max_tokens": 250, "n": 2}
    made = chat_job(id, **{**sampling, **fields.pop("sampling", {})})
    fields = {"required_tools": list(names), "parallel_tool_calls": False, **fields}
    return msgspec.structs.replace(made, **tools(*names), **fields)


def test_random_weights_make_the_calls_that_are_asked_for(served):
    engine, collector, bias = served
    jobs = [tool_job(f"{name} {seed}", bias, (name,), seed) for name in NAMES for seed in range(10)]
    jobs += [tool_job(f"two {seed}", bias, NAMES[:2], seed, parallel_tool_calls=True) for seed in range(5)]
    ended: dict[str, int] = {}
    for job, result in zip(jobs, run(engine, collector, jobs), strict=True):
        for index in range(2):
            assert result.text(index) == ""
            reason = result.finish(index)[0]
            for name, text in calls(result, index):
                jsonschema.validate(json.loads(text), SCHEMAS[name])
                assert name in job.required_tools
            if reason == "tool_calls":
                assert calls(result, index)
                ended[job.id[:-2]] = ended.get(job.id[:-2], 0) + 1
            else:
                assert reason == "length"
        kinds = Delta | ReasoningDelta | ToolCallDelta
        tokens = sum(event.tokens for event in result.events if isinstance(event, kinds))
        assert tokens == result.usage.completion_tokens
    # the rest were cut by max_tokens
    assert all(ended.get(name, 0) >= 5 for name in NAMES), ended


def test_a_call_that_is_cut_is_left_out(served):
    engine, collector, bias = served
    jobs = [
        tool_job(f"cut {size}", bias, ("optional",), 3, sampling={"max_tokens": size, "n": 1})
        for size in range(1, 12)
    ]
    for result in run(engine, collector, jobs):
        assert result.finish()[0] == "length" and calls(result) == []
        # a mark may have been cut, too
        assert any(turn.startswith(result.text()) for turn in TURNS.values())
