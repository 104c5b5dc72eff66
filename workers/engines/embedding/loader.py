"""Loads the weights and the tokenizer of a sentence embedding model.

Only safetensors files are read, and code from a model repository is never run.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from catalogue import EmbeddingModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.checkpoint import refuse_broken_files, refuse_incomplete
from workers.engines.device import choose_device, half_precision
from workers.engines.embedding.modules import Files, Modules, read_modules
from workers.engines.embedding.pooling import Head
from workers.engines.load_errors import load_error, refuse_too_large

SANE_LENGTH = 10**9
"""transformers writes a larger `model_max_length` for a tokenizer that has none."""

POOLER = "pooler."
"""How the names of weights begin that follow BERT's first token to a classifier."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A model on its device. `max_tokens`: of an input. `matryoshka`: sizes that requests may ask for."""

    model: Any
    tokenizer: Any
    head: Head
    device: torch.device
    max_tokens: int
    lower_case: bool
    vocabulary_size: int
    pad_token: int
    matryoshka: frozenset[int] | None
    """None: every size up to the model's own."""
    options: dict[str, Any]
    """Further arguments of the model."""

    @torch.inference_mode()
    def vectors(self, inputs: list[list[int]]) -> Tensor:
        """Return the vectors of inputs, [batch, size] in float32 on the device, before `Head.finish`."""
        counts = [len(tokens) for tokens in inputs]
        width = max(counts)
        padded = torch.tensor([tokens + [self.pad_token] * (width - len(tokens)) for tokens in inputs])
        lengths = torch.tensor(counts).to(self.device)
        # without padding no mask is needed, and attention is faster without one
        mask = None
        if min(counts) < width:
            mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        output = self.model(input_ids=padded.to(self.device), attention_mask=mask, **self.options)
        return self.head(output.last_hidden_state, lengths)

    def describe(self) -> str:
        """One line for the log."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{where}, {dtype}, {self.head.describe()}, inputs of at most {self.max_tokens} tokens"


def load_encoder(entry: EmbeddingModelEntry) -> LoadedEncoder:
    """Load what a catalogue entry names. Raises EngineLoadError, with one line that names the model."""
    try:
        return _load(entry)
    except EngineLoadError as error:
        raise load_error(entry, error, str(error)) from error
    except Exception as error:  # network, disk, file formats and devices raise many types
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise load_error(entry, error, f"can't load {entry.source}: {text}") from error


def _load(entry: EmbeddingModelEntry) -> LoadedEncoder:
    device, folder = choose_device(), Path(entry.weights)
    # of the hub's files the client library checks the sizes
    refuse_broken_files(folder.glob("*") if folder.is_dir() else [])
    modules = read_modules(Files(entry.weights, entry.revision))
    source: dict[str, Any] = {
        "revision": entry.revision,
        "trust_remote_code": False,
        "subfolder": modules.subfolder,
    }
    config = AutoConfig.from_pretrained(entry.weights, **source)
    if config.is_encoder_decoder:
        name = ", ".join(config.architectures or [config.model_type])
        raise EngineLoadError(
            f"{name} is an encoder-decoder model; embeddings need an encoder or a decoder alone"
        )
    tokenizer = AutoTokenizer.from_pretrained(entry.weights, **source)
    model = _read(entry, config, source).eval()
    refuse_too_large([model], device)
    model.to(device)
    for layer in modules.head.dense:
        layer.to(device)
    text = config.get_text_config()
    return LoadedEncoder(
        model=model,
        tokenizer=tokenizer,
        head=modules.head,
        device=device,
        max_tokens=_max_tokens(entry, modules, text, tokenizer, model),
        lower_case=modules.lower_case,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
        pad_token=_pad_token(text, tokenizer),
        matryoshka=_matryoshka(entry, config),
        options={"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {},
    )


def _read(entry: EmbeddingModelEntry, config: PreTrainedConfig, source: dict[str, Any]) -> Any:
    model, info = AutoModel.from_pretrained(
        entry.weights,
        config=config,
        dtype=_dtype(entry.engine.dtype),
        use_safetensors=True,
        # refused below, with the names of the weights
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **source,
    )
    if getattr(model, "pooler", None) is not None:
        # it is not used here, and many checkpoints of sentence embedding models have no weights for it
        model.pooler = None
        info["missing_keys"] = [key for key in info["missing_keys"] if not key.startswith(POOLER)]
        info["mismatched_keys"] = [row for row in info["mismatched_keys"] if not row[0].startswith(POOLER)]
    refuse_incomplete(info, type(model).__name__)
    return model


def _dtype(name: str) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return half_precision() if choose_device().type == "cuda" else torch.float32


def _max_tokens(
    entry: EmbeddingModelEntry, modules: Modules, text: PreTrainedConfig, tokenizer: Any, model: nn.Module
) -> int:
    """Return the tokens that an input may have. Raises EngineLoadError if nothing says it."""
    most = [getattr(text, "max_position_embeddings", None), _position_rows(model)]
    if tokenizer.model_max_length < SANE_LENGTH:
        most.append(tokenizer.model_max_length)
    known = [int(limit) for limit in [*most, modules.max_tokens] if limit and limit > 0]
    if entry.engine.max_context is not None:
        # instead of max_seq_length, which may be less than what the model can have
        known = [int(limit) for limit in most if limit and limit > 0] + [entry.engine.max_context]
    if not known:
        raise EngineLoadError("the model doesn't say how many tokens an input can have; set max_context")
    return min(known)


def _position_rows(model: nn.Module) -> int | None:
    """Return the positions of a learned table; None without one. RoBERTa's begin after the padding's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _pad_token(text: PreTrainedConfig, tokenizer: Any) -> int:
    for token in (text.pad_token_id, tokenizer.pad_token_id):
        if isinstance(token, int) and token >= 0:
            return token
    return 0


def _matryoshka(entry: EmbeddingModelEntry, config: PreTrainedConfig) -> frozenset[int] | None:
    """Return the sizes beside the model's own that a request may ask for; None: all smaller ones."""
    listed = getattr(config, "matryoshka_dimensions", None)
    wanted = entry.engine.matryoshka
    if wanted is False:
        return frozenset()
    if listed:
        return frozenset(map(int, listed))
    return None if wanted or getattr(config, "is_matryoshka", False) else frozenset()
