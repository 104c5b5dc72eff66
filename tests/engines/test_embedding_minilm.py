"""The embedding engine with all-MiniLM-L6-v2, a trained model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.engines.tiny_chat import Collector
from tests.engines.tiny_embedding import job, load, vectors_of
from workers.engines.embedding import EmbeddingEngine

pytestmark = pytest.mark.slow

TEXTS = [
    "How do I bake bread at home?",
    "A recipe for a loaf made in your own oven.",
    "The central bank raised interest rates again.",
    "Die Katze schläft. 你好，世界! naïve café",
    "No",
    "A long paragraph about nothing in particular. " * 20,
]


@pytest.fixture(scope="module")
def loaded(minilm: Path) -> Iterator[tuple[EmbeddingEngine, Collector]]:
    engine, collector = load(minilm)
    yield engine, collector
    engine.close()


@pytest.fixture(scope="module")
def vectors(loaded: tuple[EmbeddingEngine, Collector]) -> list[torch.Tensor]:
    engine, collector = loaded
    engine.submit(job("all", *TEXTS))
    return vectors_of(collector, "all")


def test_vectors_are_those_of_transformers_with_mean_pooling(
    minilm: Path, vectors: list[torch.Tensor]
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_vector_is_the_same_alone_and_in_a_batch(
    loaded: tuple[EmbeddingEngine, Collector], vectors: list[torch.Tensor]
) -> None:
    engine, collector = loaded
    for place, text in enumerate(TEXTS):
        engine.submit(job(f"alone-{place}", text))
        (alone,) = vectors_of(collector, f"alone-{place}")
        torch.testing.assert_close(alone, vectors[place], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("How do I bake bread?", "Instructions for making a loaf", "The king abdicated in 1936"),
        ("a cat sleeps on the sofa", "the kitten naps on a couch", "a rocket is launched into orbit"),
        ("My laptop does not turn on", "The computer won't start", "I enjoy long walks on the beach"),
        (
            "Paris is the capital of France",
            "France's seat of government is Paris",
            "Water boils at 100 degrees",
        ),
    ],
)
def test_similar_sentences_are_closer_than_different_ones(
    loaded: tuple[EmbeddingEngine, Collector], text: str, near: str, far: str
) -> None:
    engine, collector = loaded
    engine.submit(job(text, text, near, far))
    first, second, third = vectors_of(collector, text)
    assert first @ second > 0.5 > 0.3 > first @ third
    assert first.norm().item() == pytest.approx(1, abs=1e-5)
