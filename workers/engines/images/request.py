"""One picture request inside the engine: what was asked, what it was resolved to, and how far it has come."""

import secrets
from collections import deque
from collections.abc import Iterator

from PIL import Image

from protocol.errors import UnsupportedParameter
from protocol.jobs import ImageJob
from workers.engines.images.loader import Pipelines
from workers.engines.images.pipeline import ImagePipeline, Kind, Piece, Recipe
from workers.engines.images.pixels import Source, decode_source, encode_png, fit, round_side, same_shape

SEED_LIMIT = 2**63


class Request:
    """Made by `submit`; `prepare` fills `recipe` and `source`. Afterwards only the engine's threads touch it."""

    recipe: Recipe
    pipeline: ImagePipeline

    def __init__(self, job: ImageJob) -> None:
        self.job = job
        self.source: Source | None = None
        self.undrawn = deque(range(job.n))
        self.unsent = job.n
        self.started = False
        self.drawn = 0
        self.progress = 0
        self._seed = job.seed if job.seed is not None else secrets.randbelow(SEED_LIMIT)

    def prepare(self, pipelines: Pipelines) -> None:
        """Decode and scale the source, settle the size and choose the pipeline.

        Raises InvalidImage and UnsupportedParameter.
        """
        job = self.job
        if job.task == "edit":
            decoded = decode_source(job.image or b"", job.mask)
            size = _edit_size(job, decoded.image.size, pipelines)
            self.source = fit(_with_usable_mask(decoded, pipelines), size)
            kind: Kind = "inpaint" if self.source.mask else "image2image"
        else:
            size = (job.width or pipelines.default_side, job.height or pipelines.default_side)
            kind = "text2image"
        pipeline = getattr(pipelines, kind)
        if pipeline is None:
            raise UnsupportedParameter(
                f"model {job.model!r} can't serve the task {job.task!r}", param="model"
            )
        self.pipeline = pipeline
        negative = job.negative_prompt is not None
        self.recipe = Recipe(
            kind,
            *size,
            job.num_inference_steps,
            job.guidance_scale,
            job.strength if self.source else None,
            negative,
        )

    def seed(self, index: int) -> int:
        """Of picture `index`: asked for alone with this seed, it comes out the same."""
        return (self._seed + index) % SEED_LIMIT

    def piece(self, index: int) -> Piece:
        """Picture `index` for a pipeline's call."""
        source, job = self.source, self.job
        image, mask = (source.image, source.mask) if source else (None, None)
        return Piece(job.prompt, job.negative_prompt or "", self.seed(index), image, mask)


def warm_up_requests(model: str, pipelines: Pipelines) -> Iterator[Request]:
    """One request of one step at the default size for each thing that the model can do."""
    side = (pipelines.default_side, pipelines.default_side)
    image, mask = encode_png(Image.new("RGB", side, "gray")), encode_png(Image.new("RGB", side, "white"))
    files = {"text2image": (None, None), "image2image": (image, None), "inpaint": (image, mask)}
    for kind, (source, source_mask) in files.items():
        if getattr(pipelines, kind) is None:
            continue
        request = Request(
            ImageJob(
                id=f"warm-up-{kind}",
                model=model,
                task="edit" if source else "generation",
                prompt="warm-up",
                num_inference_steps=1,
                image=source,
                mask=source_mask,
            )
        )
        request.prepare(pipelines)
        yield request


def _with_usable_mask(source: Source, pipelines: Pipelines) -> Source:
    if source.mask is not None and pipelines.inpaint is None:
        if source.mask_requested:
            raise UnsupportedParameter("this model can't edit with a mask; leave `mask` out", param="mask")
        return source._replace(mask=None)  # a transparent background was no request to keep the rest
    if source.mask is None and pipelines.image2image is None:
        return source._replace(
            mask=Image.new("L", source.image.size, 255)
        )  # an inpainting model: all may change
    return source


def _edit_size(job: ImageJob, own: tuple[int, int], pipelines: Pipelines) -> tuple[int, int]:
    """What was asked for; sides left out keep the source's proportions at the model's usual number of pixels."""
    multiple = pipelines.size_multiple
    if job.width and job.height:
        return job.width, job.height
    if job.width:
        return job.width, round_side(job.width * own[1] / own[0], multiple)
    if job.height:
        return round_side(job.height * own[0] / own[1], multiple), job.height
    return same_shape(own, pipelines.default_side**2, multiple)
