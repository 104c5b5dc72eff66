"""Which models are checked: those of a catalogue or folder, or random ones of a usual shape."""

import gc
import shutil
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from transformers import LlamaConfig

from benchmarks.gpu_check.random_images import GIB_OF_SDXL, write_image_model
from benchmarks.random_model import small_config, write_model
from catalogue import Catalogue, ChatModelEntry, ImageModelEntry, ModelEntry
from config import ConfigurationError
from workers.engines.failures import free_memory

GIB = 2**30
GIB_OF_8B = 16
MEMORY_FOR_8B = 23 * GIB
"""Bytes. The drivers of GPUs with 24 GiB report a little less."""

STREAMS = 256
"""The largest number of streams that is checked, and the batch size where no catalogue sets one."""

Kind = TypeVar("Kind", bound=ModelEntry)


class Target(NamedTuple):
    """What the operator gave. None: a random model takes its place."""

    chat: ChatModelEntry | None = None
    image: ImageModelEntry | None = None


def read_target(path: Path | None, name: str | None = None) -> Target:
    """Read a catalogue, or make an entry for a folder of weights. Raises ConfigurationError.

    `name`: the catalogue's model to check. Without it the first chat model and the first image model are.
    """
    if path is None:
        return Target()
    if path.is_dir():
        if ImageModelEntry.lacks(path) is None:
            tasks = ("generation",)
            return Target(image=ImageModelEntry(name=path.resolve().name, tasks=tasks, weights=str(path)))
        return Target(chat=chat_entry(path.resolve().name, path))
    found = [entry for entry in Catalogue.from_file(path).models if name in (None, entry.name)]
    if not found:
        raise ConfigurationError(f"{path}: there is no model {name!r}")
    return Target(_first(found, ChatModelEntry), _first(found, ImageModelEntry))


def _first(entries: list[ModelEntry], kind: type[Kind]) -> Kind | None:
    return next((entry for entry in entries if isinstance(entry, kind)), None)


def chat_entry(name: str, weights: Path, **options: object) -> ChatModelEntry:
    """Make the entry of a model that no catalogue describes."""
    engine = {"max_batch_size": STREAMS, **options}
    fields = {"name": name, "tasks": ["chat"], "weights": str(weights), "engine": engine}
    return ChatModelEntry.model_validate(fields)


def random_chat(folder: Path, device: torch.device) -> ChatModelEntry:
    """Save a random model: of 8 billion parameters where a GPU has room for it, else a small one."""
    large = device.type == "cuda" and torch.cuda.mem_get_info(device)[1] >= MEMORY_FOR_8B
    if not large:
        return random_small(folder)
    _require_space(folder, GIB_OF_8B)
    write_model(folder / "8b", config=shape_of_8b(), device=device.type, dtype=torch.bfloat16)
    _free_memory()
    return chat_entry("random Llama of 8 B", folder / "8b")


def random_small(folder: Path, **options: object) -> ChatModelEntry:
    """Save a random model of 4.2 million parameters in float32."""
    write_model(folder / "small")
    return chat_entry("random Llama of 4.2 M", folder / "small", **options)


def shape_of_8b() -> LlamaConfig:
    """The configuration of Llama 3.1 8B, without end tokens."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
    }
    return LlamaConfig(**small_config().to_dict() | sizes | {"head_dim": None})


def random_images(folder: Path, device: torch.device) -> ImageModelEntry:
    """Save a random pipeline of SDXL's shape: its real size where a GPU has room for it, else a tiny one."""
    large = device.type == "cuda" and torch.cuda.mem_get_info(device)[1] >= MEMORY_FOR_8B
    if large:
        _require_space(folder, GIB_OF_SDXL)
    write_image_model(folder / "sdxl", large, device)
    _free_memory()
    name = "random SDXL" if large else "tiny random SDXL"
    return ImageModelEntry(name=name, tasks=("generation",), weights=str(folder / "sdxl"))


def _free_memory() -> None:
    # models hold reference cycles
    gc.collect()
    free_memory()


def _require_space(folder: Path, gib: int) -> None:
    free = shutil.disk_usage(folder).free / GIB
    if free < gib + 1:
        raise OSError(f"{folder} has {free:.0f} GiB left and the model needs {gib}: set TMPDIR")
