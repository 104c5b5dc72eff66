"""The language model inside a model that takes images, in the form of a model for text alone."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from workers.engines.base import EngineLoadError

MOST_DIFFERENCE = 5e-3
"""Between the logits of the whole model and of its parts for the same text, relative to their deviation."""


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether transformers has a model of `config` for images and text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads a model of `config`."""
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def text_layers(model: Any) -> Any:
    """Return the language model, without its head, of a model that takes images; None: it is not apart."""
    inner = getattr(model, "model", None)
    return next(
        (
            part
            for name in ("language_model", "text_model")
            if (part := getattr(inner, name, None)) is not None
        ),
        None,
    )


class LanguageModel(nn.Module):
    """Layers and head, with the interface of a causal language model of transformers."""

    def __init__(self, layers: Any, head: nn.Module) -> None:
        super().__init__()
        self.model = layers
        self.lm_head = head
        self.config: PreTrainedConfig = layers.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def forward(self, logits_to_keep: torch.Tensor | None = None, **inputs: Any) -> SimpleNamespace:
        """Compute `logits` [1, tokens, vocabulary], or those of the tokens `logits_to_keep`."""
        hidden = self.model(**inputs).last_hidden_state
        return SimpleNamespace(
            logits=self.lm_head(hidden if logits_to_keep is None else hidden[:, logits_to_keep])
        )


def language_model(model: Any) -> Any:
    """Return a causal language model of the layers and the head of a model that takes images.

    It is of the class for text alone if the layers are such a class's, as those of LLaVA are Llama's.
    Raises EngineLoadError.
    """
    layers, head, name = text_layers(model), model.get_output_embeddings(), type(model).__name__
    if layers is None or head is None:
        raise EngineLoadError(f"the language model of {name} can't be told from its other parts")
    found = _of_text_class(layers, head) or LanguageModel(layers, head)
    found.generation_config = model.generation_config
    found.is_quantized = getattr(model, "is_quantized", False)
    found.architecture = name
    found.eval()
    _compare(model, found, name)
    return found


def _of_text_class(layers: Any, head: nn.Module) -> Any:
    """Return the layers and the head as a model of the class for text alone; None if they are of no such."""
    if type(layers.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(layers.config)
    if type(getattr(plain, "model", None)) is not type(layers) or not hasattr(plain, "lm_head"):
        return None
    plain.model, plain.lm_head = layers, head
    return plain


@torch.inference_mode()
def _compare(model: Any, found: Any, name: str) -> None:
    """Raise EngineLoadError if the whole model has other logits: it may scale or cap them, for example."""
    device = found.get_input_embeddings().weight.device
    rows = found.get_input_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (1, 16), generator=random).to(device)
    positions = torch.arange(16, device=device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    parts = found(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    difference = float((own - parts).square().mean().sqrt() / own.std().clamp(min=1e-6))
    if not difference < MOST_DIFFERENCE:
        raise EngineLoadError(f"{name} computes more than its language model's layers and head do")
