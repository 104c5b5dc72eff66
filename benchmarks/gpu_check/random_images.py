"""Random pipelines of SDXL's shape, in the real size or in a tiny one."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GIB_OF_SDXL = 7


class _Size(NamedTuple):
    text: dict[str, int]
    text_2: dict[str, int]
    channels: tuple[int, int, int]
    heads: tuple[int, int, int]
    transformers: tuple[int, int, int]
    layers: int
    time: int
    vae_channels: tuple[int, ...]
    groups: int
    sample: int
    """Side of the latents."""


REAL = _Size(
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    },
    channels=(320, 640, 1280),
    heads=(5, 10, 20),
    transformers=(1, 2, 10),
    layers=2,
    time=256,
    vae_channels=(128, 256, 512, 512),
    groups=32,
    sample=128,
)
TINY = _Size(
    text={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    text_2={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    channels=(8, 16, 32),
    heads=(1, 2, 4),
    transformers=(1, 1, 2),
    layers=1,
    time=8,
    vae_channels=(8, 8, 8, 8),
    groups=4,
    sample=8,
)


def write_image_model(folder: Path, real_size: bool, device: torch.device) -> None:
    """Save a pipeline whose weights are made on `device`: bfloat16 in the real size, else float32."""
    size = REAL if real_size else TINY
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    with torch.device(device):
        parts = {
            "vae": _vae(size),
            "text_encoder": CLIPTextModel(_text(size, size.text, tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(_text(size, size.text_2, tokenizer)),
            "unet": _unet(size),
        }
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        **parts,
    )
    pipe.to(torch.bfloat16 if real_size else torch.float32).save_pretrained(folder)


def _text(size: _Size, widths: dict[str, int], tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408 if size is REAL else len(tokenizer),
        max_position_embeddings=77,
        projection_dim=widths["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **widths,
    )


def _unet(size: _Size) -> UNet2DConditionModel:
    text, text_2 = size.text["hidden_size"], size.text_2["hidden_size"]
    return UNet2DConditionModel(
        sample_size=size.sample,
        block_out_channels=size.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=size.layers,
        attention_head_dim=size.heads,
        transformer_layers_per_block=size.transformers,
        cross_attention_dim=text + text_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time,
        # six numbers of sizes and crops, and the pooled text
        projection_class_embeddings_input_dim=6 * size.time + text_2,
        norm_num_groups=size.groups,
    )


def _vae(size: _Size) -> AutoencoderKL:
    count = len(size.vae_channels)
    return AutoencoderKL(
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=size.layers,
        latent_channels=4,
        norm_num_groups=size.groups,
        sample_size=8 * size.sample,
        scaling_factor=0.13025,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Make a tokenizer of letters. Its files are written below `folder`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    source = folder / "letters"
    source.mkdir(parents=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (source / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(source, model_max_length=77)
    return tokenizer
