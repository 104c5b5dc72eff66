"""A small model on the path for GPUs."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.engines.tiny_chat import CONFIGS
from workers.engines.chat.attention.flash import FlashPagedAttention
from workers.engines.chat.cache.kv_cache import CacheShape, KVCache
from workers.engines.chat.model.runner import ModelForward, ModelRunner
from workers.engines.chat.sequence import Chunk

LENGTHS = (45, 30, 9)
CPU = torch.device("cpu")


class FlashModel:
    """A random model behind FlashPagedAttention, some sequences, and the model's logits after each."""

    def __init__(
        self, family: str, layers: int = 2, *, config: Any = None, device: torch.device = CPU
    ) -> None:
        """`config`: one instead of the family's. `device`: a GPU within a StandInGpu."""
        torch.manual_seed(0)
        if config is None:
            config = CONFIGS[family]()
            config.num_hidden_layers = layers
        self.model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in self.model.parameters():
            # the norms' weights are 1 otherwise, which would hide that one isn't used
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        self.sequences = [torch.randint(0, 500, (length,)).tolist() for length in LENGTHS]
        with torch.inference_mode():
            own = [self.model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in self.sequences]
        self.expected = torch.stack(own)
        if device != CPU:
            move_to(self.model, device)
        head_dim = getattr(config, "head_dim", None) or 16
        shape = CacheShape(layers, 2, head_dim, torch.float32, token_major=True)
        self.cache = KVCache(shape, 20, 8, 4, device)
        self.attention = FlashPagedAttention(self.cache, max_context=64)
        self.model.set_attn_implementation(self.attention.register())
        self.runner = ModelRunner(ModelForward(self.model), self.attention, device)
        self.slots = []
        for tokens in self.sequences:
            self.slots.append(self.cache.take_slot())
            self.cache.grow(self.slots[-1], len(tokens))

    def chunk(self, number: int, start: int, end: int) -> Chunk:
        tokens = self.sequences[number]
        return Chunk(self.slots[number], start, tokens[start:end], end == len(tokens))

    def prefill(self) -> None:
        """Compute all tokens but each sequence's last, in chunks of different lengths."""
        self.runner.forward([self.chunk(0, 0, 31), self.chunk(1, 0, 20)])
        self.runner.forward([self.chunk(2, 0, 8), self.chunk(0, 31, 44), self.chunk(1, 20, 29)])

    def last_tokens(self) -> list[Chunk]:
        return [self.chunk(number, length - 1, length) for number, length in enumerate(LENGTHS)]


def move_to(model: nn.Module, device: torch.device) -> None:
    """Do what `model.to(device)` does, which can't give a parameter a tensor of another class."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
