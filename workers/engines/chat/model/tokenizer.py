"""Loads a model's tokenizer, and compares one that is converted from a SentencePiece file with the original.

transformers converts a `tokenizer.model` that has no `tokenizer.json` beside it. Without the packages for
that, or with a broken file, it tries tiktoken and names that alone; with a class that doesn't fit the file,
the result cuts text into other tokens than those that the model was trained on.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from workers.engines.base import EngineLoadError

SAMPLE = "The quick brown fox: 12 + 30 = 42, naïve café, 你好, don't they all jump over the lazy dog?"
FIRST_WORD = "The"


def load_tokenizer(weights: str, source: dict[str, Any]) -> Any:
    """Load the tokenizer of a folder or hub id. `source`: arguments of `from_pretrained`.

    Raises EngineLoadError, or what transformers does.
    """
    file = Path(weights, "tokenizer.model")
    if not file.is_file() or file.with_name("tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(weights, **source)
    original = _original(file)
    tokenizer = AutoTokenizer.from_pretrained(weights, **source)
    # the first word aside: families differ in the space before it
    expected = original.encode(SAMPLE, out_type=str)[len(original.encode(FIRST_WORD)) :]
    found = tokenizer.convert_ids_to_tokens(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    if found[-len(expected) :] != expected:
        raise EngineLoadError(
            f"{file} gives other tokens as a {type(tokenizer).__name__} than by sentencepiece; name the right"
            f" tokenizer_class in tokenizer_config.json, or convert the file to a tokenizer.json"
        )
    return tokenizer


def _original(file: Path) -> Any:
    installed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    if missing := [package for package, found in installed.items() if not found]:
        raise EngineLoadError(f"{file} can't be read without the Python package {' and '.join(missing)}")
    # imported here, because few models need it
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        raise EngineLoadError(f"{file} is cut off or not a SentencePiece file") from error
