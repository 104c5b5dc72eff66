"""A diffusers pipeline behind one call: a batch of pictures in one run.

Which arguments a pipeline takes is read from its signature, so that any text-to-image, image-to-image or inpainting
pipeline of diffusers serves.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

Kind = Literal["text2image", "image2image", "inpaint"]


class Recipe(NamedTuple):
    """All that pictures must have in common to be denoised in one call. None: the pipeline's own default."""

    kind: Kind
    width: int
    height: int
    num_inference_steps: int | None
    guidance_scale: float | None
    strength: float | None
    negative: bool
    """A negative prompt was given: without one, some pipelines use zeros rather than the empty text."""


class Piece(NamedTuple):
    """What is its own in each picture of a call. `image` and `mask` have the recipe's size."""

    prompt: str
    negative_prompt: str
    seed: int
    image: Image.Image | None = None
    mask: Image.Image | None = None


OnStep = Callable[[int, int], None]
"""Called after denoising step `step` (1-based) of `total`; an exception of its own ends the pipeline's call at once."""


class ImagePipeline:
    """One diffusers pipeline. Not thread safe: its scheduler holds the state of a call."""

    def __init__(self, pipe: Any, kind: Kind) -> None:
        self.kind = kind
        self._pipe = pipe
        self._parameters = inspect.signature(pipe.__call__).parameters
        # Instruction pipelines (Kontext, Qwen-Image-Edit) read a list of pictures as several sources of one result
        self.takes_batches = "generator" in self._parameters and (
            kind == "text2image" or "strength" in self._parameters
        )
        pipe.set_progress_bar_config(disable=True)

    def __call__(self, recipe: Recipe, pieces: Sequence[Piece], on_step: OnStep) -> list[Image.Image]:
        """Draw all pieces in one run. Raises what the pipeline or `on_step` raises; several pieces need `takes_batches`."""
        arguments = self._common_arguments(recipe) | self._piece_arguments(recipe, pieces)
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        with self._watched(on_step, arguments), torch.inference_mode():
            return list(self._pipe(**arguments).images)

    def _common_arguments(self, recipe: Recipe) -> dict[str, Any]:
        given = {
            "num_inference_steps": recipe.num_inference_steps,
            self._guidance_name(): recipe.guidance_scale,
            "strength": self._strength(recipe),
        }
        settled = {name: value for name, value in given.items() if value is not None}
        return {"width": recipe.width, "height": recipe.height, "output_type": "pil"} | settled

    def _piece_arguments(self, recipe: Recipe, pieces: Sequence[Piece]) -> dict[str, Any]:
        each: dict[str, list[Any]] = {
            "prompt": [piece.prompt for piece in pieces],
            # drawn on the CPU: the same seed gives the same noise on every device
            "generator": [torch.Generator("cpu").manual_seed(piece.seed) for piece in pieces],
        }
        if recipe.negative:
            each["negative_prompt"] = [piece.negative_prompt for piece in pieces]
        if recipe.kind != "text2image":
            each["image"] = [piece.image for piece in pieces]
        if recipe.kind == "inpaint":
            each["mask_image"] = [piece.mask for piece in pieces]
        return dict(each) if self.takes_batches else {name: values[0] for name, values in each.items()}

    def _guidance_name(self) -> str:
        # Qwen-Image and its kin: `guidance_scale` is for distilled variants only, real guidance is `true_cfg_scale`
        own = self._parameters.get("guidance_scale")
        return (
            "true_cfg_scale"
            if "true_cfg_scale" in self._parameters and (own is None or own.default is None)
            else "guidance_scale"
        )

    def _strength(self, recipe: Recipe) -> float | None:
        """At least one step must remain: pipelines run int(steps x strength) of them and raise when that is none."""
        strength = recipe.strength if recipe.strength is not None else self._default("strength")
        steps = recipe.num_inference_steps or self._default("num_inference_steps")
        if strength is None or steps is None:
            return recipe.strength
        return min(1.0, max(strength, (1 + 1e-6) / steps))

    def _default(self, name: str) -> Any:
        parameter = self._parameters.get(name)
        return (
            None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        )

    def _watched(self, on_step: OnStep, arguments: dict[str, Any]) -> AbstractContextManager[None]:
        total = arguments.get("num_inference_steps") or self._default("num_inference_steps") or 1

        def callback(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # raising here, not pipe._interrupt: that would still decode the unfinished latents
            on_step(index + 1, getattr(pipe, "num_timesteps", None) or total)
            return tensors

        if "callback_on_step_end" in self._parameters:
            arguments["callback_on_step_end"] = callback
            return nullcontext()
        return _each_run_is_a_step(denoiser_of(self._pipe), on_step, total)


@contextmanager
def _each_run_is_a_step(denoiser: torch.nn.Module, on_step: OnStep, total: int) -> Iterator[None]:
    """For pipelines without callback_on_step_end (PixArt, ...): a run of the denoiser counts as a step."""
    runs = itertools.count(1)
    hook = denoiser.register_forward_hook(lambda *_: on_step(min(next(runs), total), total))
    try:
        yield
    finally:
        hook.remove()


def denoiser_of(pipe: Any) -> Any:
    """The network that is run once a step: `transformer` in newer pipelines, `unet` in older ones."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or getattr(pipe, "prior", None)
