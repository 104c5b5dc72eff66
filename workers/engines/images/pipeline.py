"""One diffusers pipeline behind one call that generates a batch of images.

The arguments of a call are chosen by the pipeline's signature, so any text-to-image, image-to-image or
inpainting pipeline of diffusers can be used.
"""

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from workers.engines.images.operations import ObservedOperations
from workers.engines.images.unfinished import UnfinishedImages

log = logging.getLogger(__name__)

Kind = Literal["text2image", "image2image", "inpaint"]


class CallParams(NamedTuple):
    """What all images of one call share. None stands for the pipeline's own default."""

    kind: Kind
    width: int
    height: int
    num_inference_steps: int | None
    guidance_scale: float | None
    strength: float | None
    has_negative_prompt: bool
    """Without a negative prompt some pipelines use zeros rather than the embedding of the empty text."""


class ImageParams(NamedTuple):
    """What differs between the images of one call. `image` and `mask` have the call's width and height."""

    prompt: str
    negative_prompt: str
    seed: int
    image: Image.Image | None = None
    mask: Image.Image | None = None


OnStep = Callable[[int, int], None]
"""Called after denoising step `step` (from 1) of `total`. An exception raised here ends the call at once."""
OnOperation = Callable[[], None]
"""Called after each torch operation, many times in a step. An exception raised here ends the call at once."""


class ImagePipeline:
    """One diffusers pipeline. Not thread-safe: its scheduler keeps the state of a call."""

    def __init__(self, pipe: Any, kind: Kind) -> None:
        self.kind = kind
        self._pipe = pipe
        self._parameters = inspect.signature(pipe.__call__).parameters
        # Instruction pipelines (Kontext, Qwen-Image-Edit) read a list of images as several sources of one
        # result.
        self.supports_batches = "generator" in self._parameters and (
            kind == "text2image" or "strength" in self._parameters
        )
        # Compiled code would be traced with the observer in it. It runs on a GPU only, where steps are short.
        self._observable = not _is_compiled(denoiser_of(pipe))
        self._has_previews = False
        pipe.set_progress_bar_config(disable=True)

    def __call__(
        self,
        shared: CallParams,
        images: Sequence[ImageParams],
        on_step: OnStep,
        on_operation: OnOperation,
        unfinished: UnfinishedImages | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each item of `images`; more than one needs `supports_batches`.

        `on_operation` is not called where the denoiser is compiled. `unfinished` can be asked for images in
        `on_step`. Raises what the pipeline or a callback raises.
        """
        arguments = self._shared_arguments(shared) | self._image_arguments(shared, images)
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        observed = ObservedOperations(on_operation) if self._observable else nullcontext()
        with (
            self._reporting_steps(on_step, arguments),
            unfinished or nullcontext(),
            torch.inference_mode(),
            observed,
        ):
            return list(self._pipe(**arguments).images)

    def warm_up(
        self, shared: CallParams, image: ImageParams, on_step: OnStep, on_operation: OnOperation
    ) -> None:
        """Generate one image, and find out whether previews can be decoded. Raises what a call raises."""
        has_parts = all(getattr(self._pipe, part, None) is not None for part in ("vae", "scheduler"))
        unfinished = UnfinishedImages(self._pipe, shared.width, shared.height) if has_parts else None
        (made,) = self(shared, [image], on_step, on_operation, unfinished)
        self._has_previews = unfinished is not None and unfinished.end_as(made)
        if not self._has_previews:
            log.info("no previews of images: a %s decodes its latents otherwise", type(self._pipe).__name__)

    def unfinished(self, shared: CallParams) -> UnfinishedImages | None:
        """Return what shows the images of a call while it runs; None if this pipeline has no previews."""
        return UnfinishedImages(self._pipe, shared.width, shared.height) if self._has_previews else None

    def _shared_arguments(self, shared: CallParams) -> dict[str, Any]:
        optional = {
            "num_inference_steps": shared.num_inference_steps,
            self._guidance_name(): shared.guidance_scale,
            "strength": self._strength(shared),
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"width": shared.width, "height": shared.height, "output_type": "pil"} | given

    def _image_arguments(self, shared: CallParams, images: Sequence[ImageParams]) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {
            "prompt": [image.prompt for image in images],
            # A generator on the CPU: the same seed gives the same noise on every device.
            "generator": [torch.Generator("cpu").manual_seed(image.seed) for image in images],
        }
        if shared.has_negative_prompt:
            lists["negative_prompt"] = [image.negative_prompt for image in images]
        if shared.kind != "text2image":
            lists["image"] = [image.image for image in images]
        if shared.kind == "inpaint":
            lists["mask_image"] = [image.mask for image in images]
        return dict(lists) if self.supports_batches else {name: values[0] for name, values in lists.items()}

    def _guidance_name(self) -> str:
        # In Qwen-Image and similar pipelines `guidance_scale` exists for distilled variants only;
        # classifier-free guidance is `true_cfg_scale`.
        guidance = self._parameters.get("guidance_scale")
        has_true_cfg = "true_cfg_scale" in self._parameters
        return (
            "true_cfg_scale"
            if has_true_cfg and (guidance is None or guidance.default is None)
            else "guidance_scale"
        )

    def _strength(self, shared: CallParams) -> float | None:
        """The strength, raised where needed so that one step remains.

        Pipelines run int(steps * strength) steps and raise ValueError when that is 0.
        """
        strength = shared.strength if shared.strength is not None else self._default("strength")
        steps = shared.num_inference_steps or self._default("num_inference_steps")
        if strength is None or steps is None:
            return shared.strength
        return min(1.0, max(strength, (1 + 1e-6) / steps))

    def _default(self, name: str) -> Any:
        parameter = self._parameters.get(name)
        return (
            None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        )

    def _reporting_steps(self, on_step: OnStep, arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """Make the call report its steps, through its callback argument where it has one, else by a hook."""
        total = arguments.get("num_inference_steps") or self._default("num_inference_steps") or 1

        def callback(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # An exception ends the call here; `pipe._interrupt` would still decode the unfinished latents.
            on_step(index + 1, getattr(pipe, "num_timesteps", None) or total)
            return tensors

        if "callback_on_step_end" in self._parameters:
            arguments["callback_on_step_end"] = callback
            return nullcontext()
        return _reporting_forward_passes(denoiser_of(self._pipe), on_step, total)


@contextmanager
def _reporting_forward_passes(denoiser: torch.nn.Module, on_step: OnStep, total: int) -> Iterator[None]:
    """Count forward passes of the denoiser as steps, for pipelines without a callback (PixArt, ...)."""
    passes = itertools.count(1)
    hook = denoiser.register_forward_hook(lambda *_: on_step(min(next(passes), total), total))
    try:
        yield
    finally:
        hook.remove()


def _is_compiled(denoiser: Any) -> bool:
    """Whether `compile` was called on the network or on a part of it."""
    modules = denoiser.modules() if isinstance(denoiser, torch.nn.Module) else ()
    return any(module._compiled_call_impl is not None for module in modules)


def denoiser_of(pipe: Any) -> Any:
    """Return the network that runs once in a step: `transformer` in newer pipelines, `unet` in older ones."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or getattr(pipe, "prior", None)
