"""Reads the files in which sentence-transformers says what follows the transformer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from workers.engines.base import EngineLoadError
from workers.engines.checkpoint import read_json
from workers.engines.embedding.pooling import Dense, Head, PoolingMode

POOLING_MODES: dict[str, PoolingMode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""By their names in `pooling_mode`."""

POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""The same names, as keys that are true or false in most models."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
NO_MODULES = "without modules.json, so the pooling is a guess"


@dataclass(frozen=True)
class Modules:
    """What the files say. `subfolder`: of the transformer. `max_tokens`: of an input, None if not said."""

    head: Head
    subfolder: str
    max_tokens: int | None
    lower_case: bool


class Files:
    """The files of a model, in a folder or on the hub."""

    def __init__(self, weights: str, revision: str | None) -> None:
        self._weights = weights
        self._revision = revision

    def find(self, name: str) -> Path | None:
        """Return the path of a file, None if the model has none. Raises what transformers does."""
        found = cached_file(
            self._weights,
            name,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(found)

    def need(self, name: str) -> Path:
        """Return the path of a file. Raises EngineLoadError if the model has none."""
        if (found := self.find(name)) is None:
            raise EngineLoadError(f"{self._weights} has no {name}, which its modules.json requires")
        return found

    def json(self, name: str) -> Any:
        """Return what a JSON file holds, None without the file. Raises EngineLoadError."""
        found = self.find(name)
        return None if found is None else read_json(found)


def read_modules(files: Files) -> Modules:
    """Read what follows the transformer. Raises EngineLoadError for what this engine does not compute."""
    listed = files.json("modules.json")
    if listed is None:
        return Modules(Head("mean", (), False, NO_MODULES), "", *_sentence_config(files, ""))
    try:
        modules = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in listed]
    except (TypeError, KeyError) as error:
        raise EngineLoadError("modules.json does not list modules with type and path") from error
    kinds = [kind for kind, _ in modules]
    expected = [
        "Transformer",
        "Pooling",
        *["Dense"] * kinds.count("Dense"),
        *["Normalize"] * ("Normalize" in kinds),
    ]
    if kinds != expected:
        raise EngineLoadError(
            f"modules.json lists {', '.join(kinds)}; this engine computes Transformer, Pooling, Dense and"
            " Normalize, in this order"
        )
    subfolder, pooling = modules[0][1], modules[1][1]
    dense = tuple(_dense(files, path) for kind, path in modules if kind == "Dense")
    head = Head(_pooling(files, f"{pooling}/config.json"), dense, "Normalize" in kinds, "by modules.json")
    return Modules(head, subfolder, *_sentence_config(files, subfolder))


def _sentence_config(files: Files, subfolder: str) -> tuple[int | None, bool]:
    """Return the limit in tokens, and whether texts are converted to lower case."""
    found = files.json(f"{subfolder}/sentence_bert_config.json" if subfolder else "sentence_bert_config.json")
    config = found if isinstance(found, dict) else {}
    limit = config.get("max_seq_length")
    return (limit if isinstance(limit, int) and limit > 0 else None), bool(config.get("do_lower_case"))


def _pooling(files: Files, name: str) -> PoolingMode:
    config = read_json(files.need(name))
    if not isinstance(config, dict):
        raise EngineLoadError(f"{name} does not hold a JSON object")
    found = config.get("pooling_mode")
    modes = found if isinstance(found, list) else [found] if found else list(_chosen(config))
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise EngineLoadError(
            f"{name} asks for pooling by {' and '.join(map(str, modes)) or 'nothing'}; this engine pools by"
            f" one of {', '.join(POOLING_MODES)}"
        )
    return POOLING_MODES[modes[0]]


def _chosen(config: dict[str, Any]) -> Iterator[str]:
    for key, mode in POOLING_KEYS.items():
        if config.get(key):
            yield mode


def _dense(files: Files, path: str) -> Dense:
    config = read_json(files.need(f"{path}/config.json"))
    try:
        name = str(config.get("activation_function") or "Tanh").rpartition(".")[2]
        if name not in ACTIVATIONS:
            raise EngineLoadError(f"{path} has the activation {name}; known are {', '.join(ACTIVATIONS)}")
        linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        weights = load_file(files.need(f"{path}/model.safetensors"))
        linear.load_state_dict(
            {key.removeprefix("linear."): weight.to(torch.float32) for key, weight in weights.items()}
        )
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise EngineLoadError(f"the weights of {path} don't fit its config.json") from error
    return Dense(linear, ACTIVATIONS[name]())
