"""Folders of weights whose files don't fit together: each is refused in one line that names the fault."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import tiny_chat, tiny_images
from workers.engines.base import EngineLoadError
from workers.engines.images import ImageEngine

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def chat_weights(tmp_path_factory) -> Path:
    return tiny_chat.save_model(tmp_path_factory.mktemp("llama"), tiny_chat.CONFIGS["llama"]())


@pytest.fixture(scope="module")
def image_weights(tmp_path_factory) -> Path:
    return tiny_images.write_model(tmp_path_factory.mktemp("tiny"))


def chat_refusal(weights: Path) -> str:
    """Return the line with which the chat engine refuses the folder."""
    with pytest.raises(EngineLoadError) as caught:
        tiny_chat.make_engine(weights)
    return one_line(caught.value)


def image_refusal(weights: Path) -> str:
    """Return the line with which the image engine refuses the folder."""
    with pytest.raises(EngineLoadError) as caught:
        ImageEngine(tiny_images.entry(weights)).load(tiny_images.Collector())
    return one_line(caught.value)


def one_line(error: EngineLoadError) -> str:
    assert str(error).startswith("tiny: ") and "\n" not in str(error)
    return str(error)


def copy(weights: Path, folder: Path) -> Path:
    shutil.copytree(weights, folder, dirs_exist_ok=True)
    return folder


def change(file: Path, key: str, shorten: bool) -> None:
    """Take a weight, or its last row, out of a file."""
    tensors = load_file(file)
    tensor = tensors.pop(key)
    if shorten:
        tensors[key] = tensor[:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def halve(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda data: POINTER, "is a Git LFS pointer"),
    "cut": (halve, "is cut off or not a JSON file"),
    "empty": (lambda data: b"", "is cut off or not a JSON file"),
    "list": (lambda data: b"[]", "does not hold a JSON object"),
}
CHAT_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CHAT_FILES)
def test_a_broken_file_of_a_chat_model_is_named(chat_weights, tmp_path, name, damage):
    file = copy(chat_weights, tmp_path) / name
    change_bytes, words = DAMAGES[damage]
    file.write_bytes(change_bytes(file.read_bytes() if file.exists() else b'{"weight_map": {}}'))
    assert f"{file} {words}" in chat_refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [(POINTER.decode(), "chat_template.jinja is a Git LFS"), ("{% if messages %}", "broken at line 1")],
    ids=["pointer", "cut"],
)
def test_a_broken_chat_template_is_named(chat_weights, tmp_path, text, words):
    (copy(chat_weights, tmp_path) / "chat_template.jinja").write_text(text)
    assert words in chat_refusal(tmp_path)


def test_a_template_that_wants_other_messages_is_served(chat_weights, tmp_path):
    template = "{{ raise_exception('no') if messages[0]['role'] != 'system' }}{{ messages[0]['content'] }}"
    (copy(chat_weights, tmp_path) / "chat_template.jinja").write_text(template)
    engine, _ = tiny_chat.make_engine(tmp_path)
    engine.close()


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}'])
def test_json_without_what_is_needed_is_refused_in_one_line(chat_weights, tmp_path, text):
    (copy(chat_weights, tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    chat_refusal(tmp_path)
    (copy(chat_weights, tmp_path) / "tokenizer.json").write_text(text)
    assert "KeyError" in chat_refusal(tmp_path)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_chat_weight_of_another_shape_is_named(chat_weights, tmp_path, key):
    change(copy(chat_weights, tmp_path) / "model.safetensors", key, shorten=True)
    assert f"have {key} as [" in chat_refusal(tmp_path)


PARTS = {
    "text_encoder/model.safetensors": "encoder.layers.0.mlp.fc1.weight",
    "unet/diffusion_pytorch_model.safetensors": "conv_in.weight",
    "vae/diffusion_pytorch_model.safetensors": "decoder.conv_in.weight",
}


@pytest.mark.parametrize("shorten", [False, True], ids=["missing", "shape"])
@pytest.mark.parametrize("name", PARTS)
def test_an_image_model_whose_weights_do_not_fit_is_refused(image_weights, tmp_path, name, shorten):
    file = copy(image_weights, tmp_path) / name
    key = next(key for key in load_file(file) if key.endswith(PARTS[name]))
    change(file, key, shorten)
    assert PARTS[name] in image_refusal(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/tokenizer.json", "unet/config.json"])
def test_a_broken_file_of_an_image_model_is_named(image_weights, tmp_path, name):
    file = copy(image_weights, tmp_path) / name
    file.write_bytes(POINTER)
    assert f"{file} is a Git LFS pointer" in image_refusal(tmp_path)


DEMO = Path(__file__).parents[2] / "demo" / "models" / "chat"


def damage_demo(folder: Path, key: str, damage: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Copy the demo chat model and change one weight."""
    file = copy(DEMO, folder) / "model.safetensors"
    tensors = load_file(file)
    tensors[key] = damage(tensors[key]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def shuffle(tensor: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order].view_as(tensor)


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        pytest.param("model.embed_tokens.weight", shuffle, id="shuffled"),
        pytest.param("model.embed_tokens.weight", lambda tensor: tensor.roll(1, 0), id="moved by a row"),
        pytest.param("model.layers.0.mlp.gate_proj.weight", shuffle, id="shuffled product"),
        pytest.param("model.layers.0.mlp.down_proj.weight", lambda tensor: tensor * -1, id="negated product"),
    ],
)
def test_weights_that_no_longer_know_english_are_refused(tmp_path, key, damage):
    line = chat_refusal(damage_demo(tmp_path, key, damage))
    assert re.search(r"plain English has a log probability of -\d+\.\d for each token", line)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("trained", [True, False])
def test_weights_that_are_not_finite_are_refused(chat_weights, tmp_path, trained, value):
    copy(DEMO if trained else chat_weights, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    assert "the model's logits are not finite" in chat_refusal(tmp_path)


def test_an_undamaged_trained_model_is_served(tmp_path):
    key = "model.norm.weight"
    engine, _ = tiny_chat.make_engine(damage_demo(tmp_path, key, lambda tensor: tensor))
    engine.close()
