"""Loading a model's weights once for all its tasks, through diffusers' Auto classes or, where they refuse, its own class.

Weights are safetensors only and code from a repository is never run.
"""

import inspect
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging

from catalogue import ImageEngineOptions, ModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.images.pipeline import ImagePipeline, denoiser_of


class Pipelines(NamedTuple):
    """What a model can do. `image2image` None while `inpaint` isn't: an inpainting model, which edits with a mask only."""

    text2image: ImagePipeline | None
    image2image: ImagePipeline | None
    inpaint: ImagePipeline | None
    default_side: int
    size_multiple: int


def load_pipelines(entry: ModelEntry) -> Pipelines:
    """Load an entry's weights once, for all its tasks. Raises EngineLoadError."""
    options = entry.engine
    assert isinstance(options, ImageEngineOptions)
    # its warnings quote the part of a prompt that the text encoder cut off
    diffusers_logging.set_verbosity_error()
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    pipe = _load(entry, _dtype(options.dtype))
    _tune(pipe, options)
    text2image = pipe if "generation" in entry.tasks else None
    image2image, inpaint = _editors(pipe) if "edit" in entry.tasks else (None, None)
    if "edit" in entry.tasks and image2image is None and inpaint is None:
        raise EngineLoadError(f"{entry.name}: diffusers can't edit pictures with a {type(pipe).__name__}")
    default_side = options.default_size or _own_side(pipe)
    if default_side % options.size_multiple:
        raise EngineLoadError(
            f"{entry.name}: the default size {default_side} is no multiple of size_multiple {options.size_multiple}"
        )
    return Pipelines(
        text2image and ImagePipeline(text2image, "text2image"),
        image2image and ImagePipeline(image2image, "image2image"),
        inpaint and ImagePipeline(inpaint, "inpaint"),
        default_side=default_side,
        size_multiple=options.size_multiple,
    )


def device() -> str:
    """Where pipelines run: the GPU that was bound to this process, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(entry: ModelEntry, dtype: torch.dtype) -> Any:
    try:
        pipe = _read(entry, {"revision": entry.revision, "dtype": dtype, "use_safetensors": True})
        pipe.to(device())
    except Exception as error:  # a hub, a disk, a file of any kind, a device: whatever can fail here
        raise EngineLoadError(f"{entry.name}: can't load {entry.weights!r}: {_one_line(error)}") from error
    if "generation" in entry.tasks and _requires(pipe, "image"):
        raise EngineLoadError(
            f'{entry.name}: a {type(pipe).__name__} can\'t draw from text alone; use tasks = ["edit"]'
        )
    return pipe


def _read(entry: ModelEntry, settings: dict[str, Any]) -> Any:
    if "generation" in entry.tasks:
        try:
            return AutoPipelineForText2Image.from_pretrained(entry.weights, **settings)
        except ValueError as refusal:
            if "AutoPipeline can't find" not in str(refusal):
                raise
    return DiffusionPipeline.from_pretrained(entry.weights, **settings)


def _editors(pipe: Any) -> tuple[Any, Any]:
    """The image-to-image and the inpainting pipeline that share `pipe`'s weights; None for what it can't do."""
    accepts = inspect.signature(pipe.__call__).parameters
    if "mask_image" in accepts:
        return None, pipe
    image2image = _derive(AutoPipelineForImage2Image, pipe) or (pipe if "image" in accepts else None)
    return image2image, _derive(AutoPipelineForInpainting, pipe)


def _derive(auto_class: Any, pipe: Any) -> Any:
    try:
        return auto_class.from_pipe(pipe)
    except ValueError:  # how the Auto classes say that there is none for this architecture
        return None


def _requires(pipe: Any, name: str) -> bool:
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device() == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _tune(pipe: Any, options: ImageEngineOptions) -> None:
    if hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()  # decodes a batch one by one: the same pixels, a fraction of the memory peak
    denoiser = denoiser_of(pipe)
    if options.compile and device() == "cuda" and denoiser is not None:
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks(fullgraph=True)
        else:
            denoiser.compile()


def _own_side(pipe: Any) -> int:
    """Pixels of the side that the model was trained for, 1024 where it doesn't say."""
    config = getattr(denoiser_of(pipe), "config", None)
    units = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", 8)
    return units * scale if isinstance(units, int) else 1024


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
