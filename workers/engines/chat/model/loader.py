"""Loads weights and tokenizer, and refuses, by name, the models that this engine can't serve.

A model must be decoder-only with standard attention caches. output_check.py finds what its configuration
doesn't tell.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from catalogue import COMPLETION, ChatModelEntry, TextEngineOptions, TextModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.chat.cache.kv_cache import CacheShape
from workers.engines.chat.model.precision import Precision, choose_precision
from workers.engines.chat.model.tokenizer import load_tokenizer
from workers.engines.chat.vision.language_model import auto_class, language_model, takes_images
from workers.engines.chat.vision.template import adopt_template
from workers.engines.chat.vision.vision import Vision, load_vision
from workers.engines.checkpoint import refuse_broken_files, refuse_incomplete
from workers.engines.device import choose_device
from workers.engines.load_errors import load_error, refuse_too_large

SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
CPU_PAGE, GPU_PAGE = 24, 256
"""Tokens of a page. Small pages waste less memory; FlashAttention's block tables need multiples of 256."""

COMPILED_ATTENTION_THREADS = 4
"""The compiled attention runs in one thread.

For 64 rows it takes 0.4 of the time of torch's operations in one or two threads; with more threads than this,
torch's operations are faster.
"""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights on their device, and its tokenizer."""

    model: Any
    tokenizer: Any
    text_config: PreTrainedConfig
    max_context: int
    device: torch.device
    name: str
    precision: Precision
    vision: Vision | None = None
    """None: the model takes no images."""

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        name: str = getattr(self.model, "architecture", type(self.model).__name__)
        return name


def load_model(entry: TextModelEntry) -> LoadedModel:
    """Load what a catalogue entry names. Raises EngineLoadError, or what the libraries do."""
    options = entry.engine
    device = choose_device()
    config, tokenizer, model, precision = _read(entry, device)
    model = model.to(device).eval()
    source = _source(entry)
    vision = None
    if takes_images(config):
        if isinstance(entry, ChatModelEntry):
            adopt_template(tokenizer, entry.weights, source)
            vision = load_vision(model, config, entry, source, copy.deepcopy(tokenizer))
        model = language_model(model)
    if getattr(model, "_is_stateful", False) or not getattr(model, "_supports_attention_backend", True):
        raise EngineLoadError(f"{type(model).__name__} has no standard attention cache")
    if isinstance(entry, ChatModelEntry):
        _refuse_without_template(entry, tokenizer)
    text_config = config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        text_config=text_config,
        max_context=_max_context(text_config, options),
        device=device,
        name=entry.name,
        precision=precision,
        vision=vision,
    )


def _source(entry: TextModelEntry) -> dict[str, Any]:
    """The arguments of `from_pretrained`."""
    return {"revision": entry.revision, "trust_remote_code": False}


def _read(entry: TextModelEntry, device: torch.device) -> tuple[PreTrainedConfig, Any, Any, Precision]:
    """Return configuration, tokenizer, model and the dtype of its weights.

    Raises EngineLoadError, or what transformers does.
    """
    source = _source(entry)
    folder = Path(entry.weights)
    # of the hub's files the client library checks the sizes
    refuse_broken_files(folder.iterdir() if folder.is_dir() else [])
    config = AutoConfig.from_pretrained(entry.weights, **source)
    refuse_unsupported(config)
    tokenizer = load_tokenizer(entry.weights, source)
    precision = choose_precision(entry.engine.dtype, config, device)
    dtype = precision.dtype
    if not hasattr(config, "quantization_config"):
        with torch.device("meta"):
            refuse_too_large([auto_class(config).from_config(config, dtype=dtype)], device)
    # each weight goes from its file to the GPU; otherwise the host's memory would have to hold all of them
    place = {"device_map": {"": device}} if device.type == "cuda" else {}
    model, info = auto_class(config).from_pretrained(
        entry.weights,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        # refused below, with the names of the weights
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **place,
        **source,
    )
    refuse_incomplete(info, type(model).__name__)
    return config, tokenizer, model, precision


@contextmanager
def in_one_line(entry: TextModelEntry) -> Iterator[None]:
    """Turn every error of a load into an EngineLoadError that names model and weights."""
    try:
        yield
    except EngineLoadError as error:
        raise load_error(entry, error, str(error)) from error
    except SafetensorError as error:
        message = (
            f"a weights file of {entry.weights} is cut off or not a safetensors file (a Git LFS pointer?)"
        )
        raise load_error(entry, error, f"{message}: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise load_error(entry, error, "the GPU has no room for the weights at the moment") from error
    except Exception as error:
        # network, disk and file formats raise many types; tokenizers a plain Exception
        raise load_error(entry, error, f"can't load {entry.source}: {first_line(error)}") from error


def _refuse_without_template(entry: ChatModelEntry, tokenizer: Any) -> None:
    """Raise EngineLoadError unless the tokenizer has a chat template that can be compiled."""
    if not tokenizer.chat_template:
        raise EngineLoadError(
            f"{entry.weights} has no chat template;"
            f' with tasks = ["{COMPLETION.name}"] it serves {COMPLETION.path}'
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise EngineLoadError(
            f"the chat template of {entry.weights} is cut off or broken at line {error.lineno}:"
            f" {first_line(error)}"
        ) from error
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return  # it can be compiled, and wants other messages than this one


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise EngineLoadError for an architecture whose configuration shows that it can't be served."""
    name = ", ".join(config.architectures or [config.model_type])
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise EngineLoadError(f"{name} is an encoder-decoder model; chat needs a decoder-only one")
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - SUPPORTED_LAYERS)
    if unknown:
        raise EngineLoadError(
            f"{name} has layers of type {', '.join(unknown)}; only standard attention is served"
        )


def wants_flash(loaded: LoadedModel) -> bool:
    """Whether torch's FlashAttention can be tried: a GPU, half precision, no softcap on scores."""
    softcap = getattr(loaded.text_config, "attn_logit_softcapping", None)
    half = loaded.model.dtype in (torch.float16, torch.bfloat16)
    return loaded.device.type == "cuda" and half and softcap is None


def uses_compiled_attention(device: torch.device, head_dim: int) -> bool:
    """Whether attention runs in the compiled loops for a CPU, which read a cache of bfloat16, too."""
    return (
        device.type == "cpu" and torch.get_num_threads() <= COMPILED_ATTENTION_THREADS and head_dim % 8 == 0
    )


def cache_shape(loaded: LoadedModel, token_major: bool) -> CacheShape:
    """Read the cache's shape from the configuration. Raises EngineLoadError if layers differ in heads."""
    text = loaded.text_config
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        raise EngineLoadError("layers with different numbers of heads are not served")
    dtype = loaded.model.dtype
    if loaded.device.type == "cpu" and not (
        dtype == torch.bfloat16 and uses_compiled_attention(loaded.device, head_dim)
    ):
        # torch's own operations are slow on a CPU with 16 bits
        dtype = torch.float32
    return CacheShape(text.num_hidden_layers, kv_heads, head_dim, dtype, token_major)


def _max_context(text: PreTrainedConfig, options: TextEngineOptions) -> int:
    own = getattr(text, "max_position_embeddings", None) or options.max_context
    if own is None:
        raise EngineLoadError("the model doesn't say how long its context is; set max_context")
    context = min(int(own), options.max_context or int(own))
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    trained = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if kind in LENGTH_DEPENDENT_ROPE and context > int(trained or own):
        # the angles depend on a batch's longest sequence: one request would change the text of another
        raise EngineLoadError(
            f"{kind} positions can't be batched; set max_context to {trained or own} or less"
        )
    return context


def first_line(error: BaseException) -> str:
    """Return the error's first line, or its type; both where the text alone says nothing, as a missing
    key."""
    lines = str(error).strip().splitlines()
    if isinstance(error, LookupError | TypeError | AttributeError):
        return ": ".join([type(error).__name__, *lines[:1]])[:300]
    return lines[0][:300] if lines else type(error).__name__
