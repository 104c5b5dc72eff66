"""Loads the weights of an image model once for all its tasks.

diffusers' Auto classes choose the pipeline; a model that they do not know is loaded as the class that it
names. Only safetensors files are read, and code from a model repository is never run.
"""

import inspect
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging

from catalogue import ImageEngineOptions, ImageModelEntry
from protocol.errors import ContextLengthExceeded
from workers.engines.base import EngineLoadError
from workers.engines.checkpoint import refuse_broken_files
from workers.engines.device import choose_device, half_precision
from workers.engines.images.components import complete_components
from workers.engines.images.pipeline import ImagePipeline, denoiser_of
from workers.engines.images.prompt_limit import PromptLimit
from workers.engines.images.size import size_problem
from workers.engines.load_errors import load_error, refuse_too_large

log = logging.getLogger(__name__)


class Pipelines(NamedTuple):
    """The pipelines of one model, which share its weights; None for what the model can't do.

    An inpainting model has `inpaint` and no `image2image`: it edits with a mask only. Sides are in pixels.
    """

    text2image: ImagePipeline | None
    image2image: ImagePipeline | None
    inpaint: ImagePipeline | None
    default_side: int
    limits: ImageEngineOptions
    prompt_limit: PromptLimit


def load_pipelines(entry: ImageModelEntry) -> Pipelines:
    """Load the weights of a catalogue entry and derive a pipeline for each task. Raises EngineLoadError."""
    options, started = entry.engine, time.monotonic()
    # diffusers' warnings quote the part of a prompt that the text encoder cut off.
    diffusers_logging.set_verbosity_error()
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    pipe = _load(entry, _dtype(options.dtype))
    _tune(pipe, options)
    text2image = pipe if "generation" in entry.tasks else None
    image2image, inpaint = _editors(pipe) if "edit" in entry.tasks else (None, None)
    if "edit" in entry.tasks and image2image is None and inpaint is None:
        raise EngineLoadError(f"{entry.name}: diffusers can't edit images with a {type(pipe).__name__}")
    default_side = options.default_size or _native_side(pipe)
    if problem := size_problem((default_side, default_side), options):
        raise EngineLoadError(f"{entry.name}: the default size can't be served: {problem}; set default_size")
    log.info(
        "%s loaded in %.1f s: %s, %s, images of %d pixels a side by default",
        entry.name,
        time.monotonic() - started,
        torch.cuda.get_device_name() if choose_device().type == "cuda" else "CPU",
        str(pipe.dtype).removeprefix("torch."),
        default_side,
    )
    return Pipelines(
        text2image and ImagePipeline(text2image, "text2image"),
        image2image and ImagePipeline(image2image, "image2image"),
        inpaint and ImagePipeline(inpaint, "inpaint"),
        default_side=default_side,
        limits=options,
        prompt_limit=_prompt_limit(pipe, entry),
    )


def _load(entry: ImageModelEntry, dtype: torch.dtype) -> Any:
    folder = Path(entry.weights)
    try:
        # of the hub's files the client library checks the sizes
        refuse_broken_files([*folder.glob("*"), *folder.glob("*/*")] if folder.is_dir() else [])
        with complete_components():
            pipe = _read(entry, {"revision": entry.revision, "dtype": dtype, "use_safetensors": True})
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        refuse_too_large(modules, choose_device())
        pipe.to(choose_device())
    except EngineLoadError as error:
        raise load_error(entry, error, str(error)) from error
    except Exception as error:  # network, disk, file formats and devices raise many types
        raise load_error(entry, error, f"can't load {entry.source}: {_one_line(error)}") from error
    if "generation" in entry.tasks and _requires(pipe, "image"):
        raise EngineLoadError(
            f'{entry.name}: a {type(pipe).__name__} can\'t generate images from text alone; use tasks = ["edit"]'
        )
    return pipe


def _read(entry: ImageModelEntry, settings: dict[str, Any]) -> Any:
    if "generation" in entry.tasks:
        try:
            return AutoPipelineForText2Image.from_pretrained(entry.weights, **settings)
        except ValueError as refusal:
            if "AutoPipeline can't find" not in str(refusal):
                raise
    return DiffusionPipeline.from_pretrained(entry.weights, **settings)


def _editors(pipe: Any) -> tuple[Any, Any]:
    """Return the image-to-image and inpainting pipelines over `pipe`'s weights; None for what it can't do."""
    accepts = inspect.signature(pipe.__call__).parameters
    if "mask_image" in accepts:
        return None, pipe
    image2image = _derive(AutoPipelineForImage2Image, pipe) or (pipe if "image" in accepts else None)
    return image2image, _derive(AutoPipelineForInpainting, pipe)


def _prompt_limit(pipe: Any, entry: ImageModelEntry) -> PromptLimit:
    limit = PromptLimit(pipe)
    try:
        limit.check(entry.defaults.negative_prompt or "", "negative_prompt")
    except ContextLengthExceeded as error:
        raise EngineLoadError(f"{entry.name}: [models.defaults] {error.message}") from error
    return limit


def _derive(auto_class: Any, pipe: Any) -> Any:
    try:
        return auto_class.from_pipe(pipe)
    except ValueError:  # the Auto classes have no pipeline of this kind for the architecture
        return None


def _requires(pipe: Any, name: str) -> bool:
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return half_precision() if choose_device().type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _tune(pipe: Any, options: ImageEngineOptions) -> None:
    if hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()  # decode a batch one by one: the same pixels, a lower peak of memory
    denoiser = denoiser_of(pipe)
    if options.compile and choose_device().type == "cuda" and denoiser is not None:
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks(fullgraph=True)
        else:
            denoiser.compile()


def _native_side(pipe: Any) -> int:
    """Return the side in pixels that the model was trained for, 1024 where its configuration does not say."""
    config = getattr(denoiser_of(pipe), "config", None)
    units = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", 8)
    return units * scale if isinstance(units, int) else 1024


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
