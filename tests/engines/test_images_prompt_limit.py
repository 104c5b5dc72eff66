"""The longest prompt of pipelines with several text encoders."""

from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ContextLengthExceeded
from tests.engines.tiny_images import make_model
from workers.engines.images.prompt_limit import PromptLimit


class Pipe:
    """The parts of a pipeline from which the limit is read."""

    def __init__(self, **components: Any) -> None:
        self.components = components

    def __call__(self, prompt: str, max_sequence_length: int = 40) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return make_model(folder).tokenizer


def long_one(tokenizer: Any) -> Any:
    class Long:
        model_max_length = 512
        backend_tokenizer = tokenizer.backend_tokenizer

    return Long()


def test_a_text_is_too_long_when_every_text_encoder_cuts_it_off(tokenizer: Any) -> None:
    limit = PromptLimit(Pipe(tokenizer=tokenizer, tokenizer_2=long_one(tokenizer), tokenizer_3=None))
    limit.check("a" * 38, "prompt")
    for text in ("a" * 39, "é" * 20):  # a letter that is two tokens
        with pytest.raises(ContextLengthExceeded, match=r"has 4\d tokens; this model reads at most 40"):
            limit.check(text, "prompt")


def test_a_pipeline_without_a_tokenizer_has_no_limit() -> None:
    PromptLimit(Pipe(text_encoder=object())).check("a" * 10_000, "prompt")


def test_counting_leaves_the_tokenizer_of_the_pipeline_as_it_was(tokenizer: Any) -> None:
    limit = PromptLimit(Pipe(tokenizer=tokenizer))
    tokenizer(["a"], padding="max_length", truncation=True)
    before = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    limit.check("a" * 9, "prompt")
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == before
    assert None not in before
