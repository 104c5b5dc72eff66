"""The fields of image requests, the standard's and OpenAI's, and their conversion to a job.

The node sends `n`, `width`, `height` and `step` as 0, and `size` and `response_format` as "", when its user
left them out. So these values count as absent here, and nowhere else. Unknown fields are ignored and
reported.
"""

import re
import secrets
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from app.http.validation import first_given
from catalogue import ImageEngineOptions, ImageModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import ImageJob

MAX_PROMPT_CHARACTERS = 32_000
MAX_PARTIAL_IMAGES = 3
"""Previews of one image, as in OpenAI's API."""
_STEP_NAMES = ("step", "num_inference_steps", "steps")
ABSENT_AS_ZERO = ("n", "width", "height", *_STEP_NAMES)
_ABSENT_AS_EMPTY = ("size", "response_format")
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return _check_text(text)


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode without lone surrogates") from None
    return text


def _check_size(size: str) -> str:
    if size != "auto" and not _SIZE.fullmatch(size):
        raise ValueError('must be "WIDTHxHEIGHT" in pixels, like "1024x1024"')
    return size


def state_rules_of_streams(schema: dict[str, Any]) -> None:
    """State in JSON Schema which fields go together with `stream`."""
    streamed = {"properties": {"stream": {"const": True}}, "required": ["stream"]}
    plain = {"properties": {"stream": {"enum": [None, False]}}}
    schema["allOf"] = [
        {"anyOf": [streamed, {"properties": {"partial_images": {"enum": [None, 0]}}}]},
        {"anyOf": [plain, {"properties": {"response_format": {"enum": [None, "", "b64_json"]}}}]},
    ]


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(allow_inf_nan=False)]


class ImageRequest(BaseModel):
    """The fields of both endpoints. None means not given: the defaults of the catalogue or pipeline apply."""

    model_config = ConfigDict(
        strict=True, extra="ignore", protected_namespaces=(), json_schema_extra=state_rules_of_streams
    )

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: Annotated[Text, AfterValidator(_not_blank)]
    negative_prompt: Annotated[Text, AfterValidator(_check_text)] | None = None
    n: Count | None = None
    size: Annotated[str, AfterValidator(_check_size)] | None = None
    width: Count | None = None
    height: Count | None = None
    step: Count | None = None
    num_inference_steps: Count | None = None
    steps: Count | None = None
    guidance_scale: Annotated[Factor, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if not _is_absent(name, value)}

    def to_job(self, request_id: str, entry: ImageModelEntry) -> ImageJob:
        """Make the job for a worker. A value comes from the request, else from the catalogue's defaults, else
        it is None and the pipeline's own default applies.

        Raises InvalidRequest for values beyond the limits of the model's entry.
        """
        self._check_stream()
        defaults, limits = entry.defaults, entry.engine
        step_name = next((name for name in _STEP_NAMES if getattr(self, name) is not None), "step")
        steps = getattr(self, step_name)
        _check_at_most("n", self.n, limits.max_n)
        _check_at_most(step_name, steps, limits.max_steps)
        width, height = self._sides(limits)
        return ImageJob(
            id=request_id,
            model=entry.name,
            task="generation",
            prompt=self.prompt,
            negative_prompt=first_given(self.negative_prompt, defaults.negative_prompt),
            n=self.n or 1,
            width=width,
            height=height,
            num_inference_steps=first_given(steps, defaults.num_inference_steps),
            guidance_scale=first_given(self.guidance_scale, defaults.guidance_scale),
            # always set, so that it can be reported; 32 bits, because some JSON readers have doubles only
            seed=first_given(self.seed, secrets.randbelow(2**32)),
            partial_images=self.partial_images or 0,
        )

    def _check_stream(self) -> None:
        if self.partial_images and not self.stream:
            raise InvalidRequest("partial_images requires stream to be true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise InvalidRequest(
                'response_format must be "b64_json" in a stream, or left out', param="response_format"
            )

    def _sides(self, limits: ImageEngineOptions) -> tuple[int | None, int | None]:
        """Return the requested width and height in pixels, checked. `width` and `height` win over `size`."""
        pair = _SIZE.fullmatch(self.size or "")
        width = self.width or (int(pair[1]) if pair else None)
        height = self.height or (int(pair[2]) if pair else None)
        for name, own, side in (("width", self.width, width), ("height", self.height, height)):
            if side is not None:
                _check_side(name if own else "size", name, side, limits)
        if width and height and width * height > limits.max_pixels:
            param = "width" if self.width else "size"
            raise InvalidRequest(
                f"{param}: {width}x{height} has {width * height} pixels; this model supports at most"
                f" {limits.max_pixels}",
                param=param,
            )
        return width, height


class ImageGenerationRequest(ImageRequest):
    """The fields of POST /v1/images/generations."""


class ImageEditRequest(ImageRequest):
    """The fields of POST /v1/images/edits, without the image files, which app.images.body reads."""

    strength: Annotated[Factor, Field(gt=0, le=1)] | None = None

    def to_job(self, request_id: str, entry: ImageModelEntry) -> ImageJob:
        """Make the job as for a generation; app.images.body adds the image files."""
        job = super().to_job(request_id, entry)
        strength = first_given(self.strength, entry.defaults.strength)
        return msgspec.structs.replace(job, task="edit", strength=strength)


def _is_absent(name: str, value: Any) -> bool:
    if name in ABSENT_AS_ZERO:
        return value is None or (type(value) is int and value == 0)
    return value is None or (name in _ABSENT_AS_EMPTY and value == "")


def _check_at_most(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise InvalidRequest(f"{name} must be at most {limit} for this model (it is {value})", param=name)


def _check_side(param: str, side_name: str, side: int, limits: ImageEngineOptions) -> None:
    multiple = limits.size_multiple
    if side == 0 or side > limits.max_side or side % multiple:
        raise InvalidRequest(
            f"{param}: the {side_name} must be a multiple of {multiple}, from {multiple} to {limits.max_side}"
            " pixels",
            param=param,
        )
