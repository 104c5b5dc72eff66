"""The images of a pipeline call while it runs.

The latents after a step are an image with noise. What the scheduler expects them to become shows more, and
earlier: a blurred image that gets sharper. It is estimated in each step anyway, or follows from its numbers.
"""

import functools
import inspect
import logging
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image, ImageChops, ImageStat

from workers.engines.images.decoding import decode_latents

log = logging.getLogger(__name__)

_ALIKE = 3.0
"""Greatest mean difference, of 255, of an image and our decoding of its latents; a watermark may differ."""


class UnfinishedImages(AbstractContextManager["UnfinishedImages"]):
    """Decodes the images of the pipeline call that runs within this context. Nothing is decoded unasked.

    The call's results do not change: its latents are only looked at, and decoding draws no random numbers.
    """

    def __init__(self, pipe: Any, width: int, height: int) -> None:
        self._pipe = pipe
        self._width = width
        self._height = height
        self._given: dict[str, Any] = {}
        """The arguments of the scheduler's last step, by name."""
        self._output: tuple[Any, ...] = ()
        """What that step has returned."""

    def __enter__(self) -> "UnfinishedImages":
        scheduler = self._pipe.scheduler
        original = scheduler.step
        signature = inspect.signature(original)

        # with the signature of the original: pipelines look in it for what their scheduler takes
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self._given = signature.bind(*args, **kwargs).arguments
            self._output = output if isinstance(output, tuple) else output.to_tuple()
            return output

        scheduler.step = step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._pipe.scheduler.step

    def image(self, row: int) -> Image.Image | None:
        """Return what image `row` of the call is going to be; None before the first step, or if it is unsafe.

        Takes as long as the VAE does for one image, and as much memory as the call needs at its end.
        """
        if not self._output:
            return None
        scheduler, given = self._pipe.scheduler, self._given
        clean = _clean_latents(
            scheduler, given["model_output"], given["timestep"], given["sample"], self._output
        )
        return self._decode(clean[row : row + 1])

    def end_as(self, image: Image.Image) -> bool:
        """Whether the latents after the last step, decoded as here, are the image that the call has returned.

        They are not if the pipeline has a layout of latents that is unknown here.
        """
        try:
            with torch.inference_mode():
                decoded = self._decode(self._output[0][:1])
            if decoded is None or decoded.size != image.size:
                return False
            difference = ImageStat.Stat(
                ImageChops.difference(decoded.convert("RGB"), image.convert("RGB"))
            ).mean
        except Exception as error:  # a pipeline that works in another way may raise anything
            log.debug("latents can't be decoded: %s", type(error).__name__)
            return False
        return max(difference) <= _ALIKE

    def _decode(self, latents: torch.Tensor) -> Image.Image | None:
        return decode_latents(self._pipe, latents, self._width, self._height)


def _clean_latents(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    output: tuple[Any, ...],
) -> torch.Tensor:
    """Return the latents without noise that the step has headed for, else those after the step."""
    estimate = output[1] if len(output) > 1 else None
    if isinstance(estimate, torch.Tensor) and estimate.shape == sample.shape:
        return estimate
    if _solves_for_clean_latents(scheduler):
        latest: torch.Tensor = scheduler.model_outputs[-1]
        return latest
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # the step has already moved the index on
        sigma = scheduler.sigmas[(scheduler.step_index or 1) - 1]
        return sample.float() - sigma * model_output
    if isinstance(scheduler, PNDMScheduler):
        kept = scheduler.alphas_cumprod[int(timestep)]
        noise = 1 - kept
        if scheduler.config.prediction_type == "v_prediction":
            return kept.sqrt() * sample - noise.sqrt() * model_output
        return (sample - noise.sqrt() * model_output) / kept.sqrt()
    after: torch.Tensor = output[0]
    return after


def _solves_for_clean_latents(scheduler: Any) -> bool:
    """Whether the model outputs that a multistep solver keeps are clean latents: DPM-Solver++, UniPC."""
    algorithm = getattr(scheduler.config, "algorithm_type", None) or ""
    is_solver = algorithm.endswith("++") or getattr(scheduler, "predict_x0", False)
    return bool(is_solver and getattr(scheduler, "model_outputs", None))
