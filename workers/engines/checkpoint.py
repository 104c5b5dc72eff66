"""Finds what is wrong with a model's files, so that a load fails in one line that names the file or
weight."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.engines.base import EngineLoadError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that stands in for a file that Git LFS has not fetched."""

JSON_FILES = frozenset(
    {"config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json"}
    | {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"}
    | {"model_index.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors.index.json"}
)
"""The files that transformers and diffusers read as JSON objects."""

OTHER_FILES = frozenset({"chat_template.jinja", "merges.txt", "tokenizer.model"})


def refuse_broken_files(files: Iterable[Path]) -> None:
    """Raise EngineLoadError for a Git LFS pointer, or for a JSON file without an object.

    transformers ignores a generation config that it can't read, sends a pointer in place of the chat template
    to the model, and names no file in most other errors.
    """
    for file in sorted(files):
        if file.name not in JSON_FILES | OTHER_FILES or not file.is_file():
            continue
        data = file.read_bytes()
        if data.startswith(POINTER):
            raise _pointer(file)
        if file.name in JSON_FILES:
            _refuse_broken_json(file, data)


def read_json(file: Path) -> Any:
    """Return what a JSON file holds. Raises EngineLoadError for a Git LFS pointer and for other texts."""
    data = file.read_bytes()
    if data.startswith(POINTER):
        raise _pointer(file)
    return _parsed(file, data)


def _refuse_broken_json(file: Path, data: bytes) -> None:
    if not isinstance(_parsed(file, data), dict):
        raise EngineLoadError(f"{file} does not hold a JSON object")


def _parsed(file: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{file} is cut off or not a JSON file: {error}") from error


def _pointer(file: Path) -> EngineLoadError:
    return EngineLoadError(f"{file} is a Git LFS pointer; fetch the file with git lfs pull")


def refuse_incomplete(info: dict[str, Any], model: str) -> None:
    """Raise EngineLoadError for weights that are missing or have another shape than the model's.

    transformers fills them with random numbers. Tied weights don't count as missing. `info` is the report on
    the load, `model` the class.
    """
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EngineLoadError(f"the weights of the {model} lack {', '.join(missing[:3])}{more}")
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise EngineLoadError(
            f"the weights of the {model} have {key} as {list(found)}; by its configuration it is {list(expected)}"
        )
