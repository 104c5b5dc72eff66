"""A pass of the embedding engine on a stand-in for a GPU, in 16 bits: its vectors, and few waits for the
device."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.engines.flash_model import move_to
from tests.engines.tiny_embedding import TEXTS, add_modules, entry_of, make_tokenizer, plain, save_model
from tests.gpu_stand_ins import StandInGpu
from workers.engines.embedding.loader import LoadedEncoder, load_encoder
from workers.engines.embedding.warm_up import warm_up

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_pass(tmp_path: Path, pooling: str) -> None:
    folder = add_modules(save_model(tmp_path), "Pooling", "Normalize", pooling_mode=pooling)
    expected = [plain(folder, text, pooling.removesuffix("token"), normalize=True) for text in TEXTS]
    loaded = replace(load_encoder(entry_of(folder, dtype="bfloat16")), device=GPU)
    inputs = make_tokenizer()(TEXTS)["input_ids"]
    with StandInGpu() as gpu:
        move_to(loaded.model, GPU)
        cost = gpu.measure(lambda: loaded.vectors(inputs))
        vectors = loaded.head.finish(cost.result, 32)
        assert vectors.device.type == "cuda" and vectors.dtype == torch.float32
        found = list(vectors.cpu())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.03, rtol=0)
    # copies of tokens and lengths, and transformers' look at the mask
    assert len(cost.waits) <= 3, cost.waits


@pytest.mark.parametrize("batch_tokens", [64, 100, 200])
def test_no_pass_of_the_warm_up_is_larger_than_those_of_requests(tmp_path: Path, batch_tokens: int) -> None:
    """A model that just fits must not fail at load."""
    sizes: list[tuple[int, int]] = []

    class Recording(LoadedEncoder):
        def vectors(self, inputs: list[list[int]]) -> torch.Tensor:
            sizes.append((len(inputs), max(map(len, inputs))))
            return super().vectors(inputs)

    entry = entry_of(save_model(tmp_path), dtype="bfloat16")
    found = load_encoder(entry)
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    loaded = Recording(**{**values, "device": GPU})
    with StandInGpu():
        move_to(loaded.model, GPU)
        warm_up(entry, loaded, batch_tokens)
    assert max(width for _, width in sizes) == loaded.max_tokens
    assert all(count == 1 or count * width <= batch_tokens for count, width in sizes), sizes
