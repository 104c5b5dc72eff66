"""Loading: what sentence-transformers' files say is done, or refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, T5Config

from tests.engines.tiny_embedding import (
    CONFIGS,
    SIZE,
    TEXTS,
    add_modules,
    entry_of,
    job,
    load,
    make_tokenizer,
    plain,
    save_model,
    vectors_of,
)
from workers.engines import LazyEngine
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.engines.embedding.loader import load_encoder


def refusal(folder: Path, **engine: Any) -> str:
    with pytest.raises(EngineLoadError) as caught:
        LazyEngine(entry_of(folder, **engine)).load(lambda events: None)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("tiny: ")
    return str(caught.value)


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def test_without_modules_the_pooling_is_mean_and_the_log_says_that_it_is_a_guess(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path)
    with caplog.at_level(logging.INFO):
        engine, collector = load(folder)
    assert "mean pooling, not normalized (without modules.json, so the pooling is a guess)" in caplog.text
    assert "inputs of at most 66 tokens, 32 dimensions" in caplog.text
    engine.submit(job("r", *TEXTS))
    for text, vector in zip(TEXTS, vectors_of(collector, "r"), strict=True):
        torch.testing.assert_close(vector, plain(folder, text, "mean", normalize=False), atol=1e-5, rtol=0)
    assert engine.status().max_model_len == 66
    engine.close()


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}, {"pooling_mode": ["cls"]}],
    ids=["keys", "name", "list"],
)
def test_the_pooling_is_read_in_each_of_its_forms(tmp_path: Path, pooling: dict[str, Any]) -> None:
    loaded = load_encoder(entry_of(add_modules(save_model(tmp_path), "Pooling", "Normalize", **pooling)))
    assert loaded.head.describe() == "cls pooling, normalized (by modules.json)"


def test_dense_layers_are_computed(tmp_path: Path) -> None:
    folder = add_modules(save_model(tmp_path), "Pooling", "Dense", "Normalize", pooling_mode="mean")
    config = {"in_features": SIZE, "out_features": 8, "bias": True}
    write_json(
        folder, "2_Dense/config.json", config | {"activation_function": "torch.nn.modules.activation.Tanh"}
    )
    weight, bias = torch.randn(8, SIZE), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    engine, collector = load(folder)
    engine.submit(job("r", "the cat"))
    (found,) = vectors_of(collector, "r")
    expected = torch.tanh(weight @ plain(folder, "the cat", "mean", normalize=False) + bias)
    torch.testing.assert_close(found, expected / expected.norm(), atol=1e-5, rtol=0)
    engine.close()


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    save_model(tmp_path / "0_Transformer")
    add_modules(tmp_path, "Pooling", pooling_mode="mean")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(tmp_path, "modules.json", modules)
    write_json(
        tmp_path, "0_Transformer/sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True}
    )
    loaded = load_encoder(entry_of(tmp_path))
    assert (loaded.max_tokens, loaded.lower_case) == (20, True)


@pytest.mark.parametrize(
    ("family", "sentence", "tokenizer", "option", "limit"),
    [
        ("bert", None, None, None, 66),
        ("bert", 20, None, None, 20),
        ("bert", 500, None, None, 66),
        ("bert", None, 30, None, 30),
        ("bert", 20, None, 40, 40),
        ("bert", 20, None, 400, 66),
        # positions begin behind the padding token's
        ("xlm-roberta", None, None, None, 64),
        ("mpnet", None, None, None, 64),
        ("qwen3", None, None, None, 66),
    ],
)
def test_the_limit_of_an_input(
    tmp_path: Path, family: str, sentence: int | None, tokenizer: int | None, option: int | None, limit: int
) -> None:
    folder = save_model(tmp_path, family)
    if sentence:
        write_json(folder, "sentence_bert_config.json", {"max_seq_length": sentence, "do_lower_case": False})
    if tokenizer:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        write_json(folder, "tokenizer_config.json", config | {"model_max_length": tokenizer})
    loaded = load_encoder(entry_of(folder, max_context=option))
    assert loaded.max_tokens == limit
    # the model can compute such an input
    assert loaded.vectors([[5] * limit]).isfinite().all()


def test_weights_without_a_pooler_are_complete(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = CONFIGS["bert"]()
    BertForMaskedLM(config).save_pretrained(folder)
    assert not any("pooler" in name for name in load_file(folder / "model.safetensors"))
    load_encoder(entry_of(folder))


def _no_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _t5(folder: Path) -> None:
    T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "can't load"),
    "a layer less": (_no_layer, "the weights of the BertModel lack encoder.layer.1.output.dense.weight"),
    "an encoder and decoder": (
        _t5,
        "is an encoder-decoder model; embeddings need an encoder or a decoder alone",
    ),
    "a broken list": (lambda folder: (folder / "modules.json").write_text("[{"), "modules.json is cut off"),
    "a list of something": (
        lambda folder: write_json(folder, "modules.json", [{"x": 1}]),
        "modules.json does not list modules with type and path",
    ),
    "a pointer": (
        lambda folder: (folder / "modules.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "modules.json is a Git LFS pointer; fetch the file with git lfs pull",
    ),
    "another module": (
        lambda folder: add_modules(folder, "Pooling", "LSTM", pooling_mode="mean"),
        "modules.json lists Transformer, Pooling, LSTM; this engine computes",
    ),
    "no pooling": (
        lambda folder: add_modules(folder, "Normalize"),
        "modules.json lists Transformer, Normalize;",
    ),
    "no configuration": (
        lambda folder: (add_modules(folder, "Pooling") / "1_Pooling/config.json").unlink(),
        "has no 1_Pooling/config.json, which its modules.json requires",
    ),
    "another pooling": (
        lambda folder: add_modules(folder, "Pooling", pooling_mode_max_tokens=True),
        "1_Pooling/config.json asks for pooling by max; this engine pools by one of cls, mean, lasttoken",
    ),
    "two poolings": (
        lambda folder: add_modules(
            folder, "Pooling", pooling_mode_max_tokens=True, pooling_mode_cls_token=True
        ),
        "asks for pooling by cls and max;",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_can_not_be_served_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path)
    spoil, message = BROKEN[name]
    spoil(folder)
    assert message in refusal(folder)


def test_a_folder_that_is_away_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(TemporaryLoadError, match="is missing, empty or can't be read"):
        load_encoder(entry_of(tmp_path / "away"))


def test_a_tokenizer_is_never_run_from_a_repository(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder, "config.json", config | {"model_type": "own", "auto_map": {"AutoModel": "own.Model"}})
    (folder / "own.py").write_text("raise SystemExit")
    make_tokenizer().save_pretrained(folder)
    assert "can't load" in refusal(folder)
