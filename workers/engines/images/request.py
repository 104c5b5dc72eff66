"""One image request inside the engine: its job, the resolved parameters and how far it has come."""

import secrets
from collections import deque
from collections.abc import Iterator

from PIL import Image

from protocol.errors import UnsupportedParameter
from protocol.jobs import ImageJob
from workers.engines.images.loader import Pipelines
from workers.engines.images.pipeline import CallParams, ImageParams, ImagePipeline, Kind
from workers.engines.images.pixels import Source, decode_source, encode_png, fit
from workers.engines.images.size import edit_size, generation_size

SEED_LIMIT = 2**63


class Request:
    """A job that is ready for a pipeline, and its progress. `source` is None unless the job is an edit."""

    def __init__(
        self, job: ImageJob, pipeline: ImagePipeline, shared: CallParams, source: Source | None
    ) -> None:
        self.job = job
        self.pipeline = pipeline
        self.shared = shared
        self.source = source
        self.pending = deque(range(job.n))
        """Indices of the images that are not part of any call yet."""
        self.generated = 0
        """Number of images that a pipeline has returned."""
        self.undelivered = job.n
        """Number of images whose ImageReady event has not been sent."""
        self.steps_reported = 0
        """Denoising steps over all images, as the last Progress event gave them."""
        self._previews = [0] * job.n
        """Number of previews that were made of each image."""
        self._seed = job.seed if job.seed is not None else secrets.randbelow(SEED_LIMIT)

    def seed(self, index: int) -> int:
        """Return the seed of image `index`. A request for one image with this seed gives the same image."""
        return (self._seed + index) % SEED_LIMIT

    def preview_is_due(self, index: int, step: int, total: int) -> bool:
        """Whether a preview of image `index` is due after `step` (from 1) of `total`."""
        steps = preview_steps(self.job.partial_images, total)
        # after a failed call the image starts again, and the previews that it has are not made again
        return step in steps[self._previews[index] :]

    def count_preview(self, index: int) -> int:
        """Count a preview of image `index`; return its number, from 0."""
        self._previews[index] += 1
        return self._previews[index] - 1

    def image_params(self, index: int) -> ImageParams:
        """Return the parameters of image `index` for a pipeline call."""
        source, job = self.source, self.job
        image, mask = (source.image, source.mask) if source else (None, None)
        return ImageParams(job.prompt, job.negative_prompt or "", self.seed(index), image, mask)


def prepare(job: ImageJob, pipelines: Pipelines) -> Request:
    """Decode and scale the source, settle the size and choose the pipeline.

    Raises ContextLengthExceeded for a prompt that would be cut off, InvalidImage for files that can't be
    decoded, InvalidRequest for a size beyond the limits and UnsupportedParameter for what the model can't do.
    """
    pipelines.prompt_limit.check(job.prompt, "prompt")
    pipelines.prompt_limit.check(job.negative_prompt or "", "negative_prompt")
    source: Source | None = None
    kind: Kind = "text2image"
    if job.task == "edit":
        decoded = decode_source(job.image or b"", job.mask)
        size = edit_size(job, decoded.image.size, pipelines.default_side, pipelines.limits)
        source = fit(_with_usable_mask(decoded, pipelines), size)
        kind = "inpaint" if source.mask else "image2image"
    else:
        size = generation_size(job, pipelines.default_side, pipelines.limits)
    pipeline: ImagePipeline | None = getattr(pipelines, kind)
    if pipeline is None:
        raise UnsupportedParameter(f"model {job.model!r} can't serve the task {job.task!r}", param="model")
    shared = CallParams(
        kind,
        *size,
        job.num_inference_steps,
        job.guidance_scale,
        job.strength if source else None,
        has_negative_prompt=job.negative_prompt is not None,
    )
    return Request(job, pipeline, shared, source)


def preview_steps(count: int, total: int) -> list[int]:
    """Return the steps, from 1 to below `total`, after which `count` previews are made: evenly spaced."""
    parts = count + 1
    steps = {(total * part + parts // 2) // parts for part in range(1, parts)}
    return sorted(step for step in steps if 0 < step < total)


def warm_up_requests(model: str, pipelines: Pipelines) -> Iterator[Request]:
    """Yield one request of one step at the default size for each pipeline of the model."""
    side = (pipelines.default_side, pipelines.default_side)
    image, mask = encode_png(Image.new("RGB", side, "gray")), encode_png(Image.new("RGB", side, "white"))
    files = {"text2image": (None, None), "image2image": (image, None), "inpaint": (image, mask)}
    for kind, (source, source_mask) in files.items():
        if getattr(pipelines, kind) is None:
            continue
        job = ImageJob(
            id=f"warm-up-{kind}",
            model=model,
            task="edit" if source else "generation",
            prompt="warm-up",
            num_inference_steps=1,
            image=source,
            mask=source_mask,
        )
        yield prepare(job, pipelines)


def _with_usable_mask(source: Source, pipelines: Pipelines) -> Source:
    if source.mask is not None and pipelines.inpaint is None:
        if source.mask_requested:
            raise UnsupportedParameter("this model can't edit with a mask; leave `mask` out", param="mask")
        # A transparent background is no request to keep the rest of the image.
        return source._replace(mask=None)
    if source.mask is None and pipelines.image2image is None:
        # An inpainting model needs a mask: the whole image may change.
        return source._replace(mask=Image.new("L", source.image.size, 255))
    return source
