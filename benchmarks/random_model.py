"""The benchmarks' model: an untrained Llama without an end token, by default of 4.2 M parameters."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


def small_config() -> LlamaConfig:
    """4 layers, hidden size 256, 8 query and 4 key-value heads."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def write_model(
    folder: Path,
    seed: int = 0,
    config: LlamaConfig | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Save a random model of `config`, by default the small one, whose weights are made on `device`.

    The tokenizer's tokens are the words w0, w1, ...: as many as the configuration says.
    """
    config = config or small_config()
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def prompts(count: int, words: int = 40) -> list[str]:
    """Return different prompts of `words` tokens each. None is a prefix of another."""
    return [
        " ".join(f"w{(7919 * (row + 1) + 31 * place) % 2000 + 2}" for place in range(words))
        for row in range(count)
    ]
