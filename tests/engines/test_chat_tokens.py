"""Tokenizers whose ids are not the rows of the model's embedding."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig

from tests.engines.tiny_chat import (
    CONFIGS,
    VOCABULARY,
    chat_job,
    make_engine,
    make_tokenizer,
    run,
    save_model,
)
from workers.engines.base import EngineLoadError

LAST = VOCABULARY - 1


@pytest.fixture
def weights(tmp_path) -> Path:
    return save_model(tmp_path, CONFIGS["llama"]())


def add_token(folder: Path, text: str, token: int, role: str = "") -> None:
    """Give the tokenizer of a folder a special token, as `role` ("bos_token"); others fill the ids before
    it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(len(tokenizer), token)])
    tokenizer.add_tokens([text], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(text) == token
    if role:
        setattr(tokenizer, role, text)
    tokenizer.save_pretrained(folder)


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


def refusal(folder: Path) -> str:
    with pytest.raises(EngineLoadError) as caught:
        make_engine(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokens = len(make_tokenizer())
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_model(tmp_path, LlamaConfig(vocab_size=tokens - 1, **shape))
    assert f"it has token {tokens - 1} (" in refusal(tmp_path)
    save_model(tmp_path, LlamaConfig(vocab_size=tokens, **shape))
    make_engine(tmp_path)[0].close()


def test_a_token_of_the_template_beyond_the_embedding_is_refused(weights):
    add_token(weights, "<|start|>", VOCABULARY)
    set_template(weights, "<|start|>{{ messages[0]['content'] }}")
    assert f"tiny: the chat template writes '<|start|>', token {VOCABULARY};" in refusal(weights)


def test_a_beginning_beyond_the_embedding_is_refused_if_the_template_writes_it(weights):
    add_token(weights, "<|start|>", VOCABULARY, "bos_token")
    make_engine(weights)[0].close()
    set_template(weights, "{{ bos_token }}{{ messages[0]['content'] }}")
    assert f"'<|start|>', token {VOCABULARY};" in refusal(weights)


def test_an_end_token_beyond_the_embedding_is_refused(weights):
    add_token(weights, "<|stop|>", VOCABULARY, "eos_token")
    set_template(weights, "{{ messages[0]['content'] }}")
    config, generation = weights / "config.json", weights / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": VOCABULARY}))
    generation.write_text(json.dumps({"eos_token_id": VOCABULARY + 5}))
    assert f"the end token is {VOCABULARY};" in refusal(weights)
    generation.write_text(json.dumps({"eos_token_id": [7, VOCABULARY]}))
    make_engine(weights)[0].close()


def test_a_padding_token_beyond_the_embedding_is_served_and_refused_in_a_prompt(weights):
    add_token(weights, "<|pad|>", VOCABULARY, "pad_token")
    engine, collector = make_engine(weights, control_tokens_in_content=True)
    try:
        plain, padded = run(engine, collector, [chat_job("plain"), chat_job("padded", "a <|pad|>")])
        assert plain.usage.completion_tokens > 0
        assert padded.failed.code == "invalid_request"
        assert f"token {VOCABULARY}" in padded.failed.message
    finally:
        engine.close()


def test_the_last_row_of_the_embedding_is_a_token_if_the_tokenizer_has_it(weights):
    add_token(weights, "<|last|>", LAST)
    engine, collector = make_engine(weights)
    try:
        job = chat_job("last", logit_bias={LAST: 100.0}, max_tokens=3, stop_token_ids=(LAST,))
        (result,) = run(engine, collector, [job])
        assert result.finish() == ("stop", LAST)
    finally:
        engine.close()
