"""Converts SmolLM2-135M-Instruct from GGUF to a folder in transformers' format. scripts/fetch-smollm2 runs
it.

    python -m demo.convert_smollm2 GGUF_FILE FOLDER

Needs the package gguf, which is not among the service's requirements.
"""

import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

CONTEXT = 8192
END = "<|im_end|>"


def convert(file: Path, folder: Path) -> None:
    """Write weights (bfloat16, as the model was published), tokenizer, chat template and generation
    config."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT)
    # GGUF names this splitting "smollm", and transformers reads it as plain byte level: without the first
    # part, white space before a digit gets other tokens than in training
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert tokenizer.eos_token == END and END in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
