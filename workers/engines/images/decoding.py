"""Decodes the latents of a diffusers pipeline into an image, as the pipeline does at the end of a call.

Pipelines have no method for this. What differs between them is read from their VAE's configuration and from
the methods that they have for their own layout of latents.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image


def decode_latents(pipe: Any, latents: torch.Tensor, width: int, height: int) -> Image.Image | None:
    """Decode the latents of one image, of the shape (1, ...) as the pipeline's scheduler has them. In pixels.

    Returns None if the pipeline's safety checker finds fault with the image. Raises what a pipeline raises
    whose latents have a layout of their own.
    """
    with _upcast(pipe):
        vae = pipe.vae
        pixels = vae.decode(_unscaled(vae, _unpacked(pipe, latents, width, height)).to(vae.dtype))[0]
    if pixels.ndim == 5:  # a VAE for videos: the image is the first frame
        pixels = pixels[:, :, 0]
    if getattr(pipe, "safety_checker", None) is not None:
        pixels, flagged = pipe.run_safety_checker(pixels, pixels.device, pipe.dtype)
        if any(flagged):
            return None
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def _unpacked(pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Return latents as a grid; some pipelines have a row of tokens instead, (1, tokens, channels)."""
    if latents.ndim != 3:
        return latents
    if hasattr(pipe, "_unpatchify_latents"):
        # FLUX.2: what is one channel to its transformer is normalized, and has 2 x 2 latents
        cell = 2 * pipe.vae_scale_factor
        tokens = latents.transpose(1, 2).reshape(1, -1, height // cell, width // cell)
        norm = pipe.vae.bn
        scale = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        unpatched: torch.Tensor = pipe._unpatchify_latents(
            tokens * scale + norm.running_mean.view(1, -1, 1, 1)
        )
        return unpatched
    known = {
        "latents": latents,
        "height": height,
        "width": width,
        "vae_scale_factor": pipe.vae_scale_factor,
    }
    accepted = inspect.signature(pipe._unpack_latents).parameters
    unpacked: torch.Tensor = pipe._unpack_latents(
        **{name: value for name, value in known.items() if name in accepted}
    )
    return unpacked


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents with the mean and the variance that the VAE expects."""
    config = vae.config
    scale: Any = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return latents / scale + (getattr(config, "shift_factor", None) or 0.0)
    shape = (1, -1) + (1,) * (latents.ndim - 2)
    mean, deviation = (latents.new_tensor(values).view(shape) for values in (mean, deviation))
    unscaled: torch.Tensor = latents * deviation / scale + mean
    return unscaled


@contextmanager
def _upcast(pipe: Any) -> Iterator[None]:
    """Let a VAE that overflows in float16 decode in float32, in the pipelines that do so too."""
    vae = pipe.vae
    needed = vae.dtype == torch.float16 and hasattr(pipe, "upcast_vae") and vae.config.force_upcast
    if needed:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if needed:
            vae.to(torch.float16)  # exact: its weights came from there
