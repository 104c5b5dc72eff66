"""The size of a result: what a request leaves open is derived, and what follows is held against the limits.

The web process has checked the sides that the client named. A side that is derived from them and from the
source is known here only. Sizes are (width, height) in pixels.
"""

import math

from catalogue import ImageEngineOptions
from protocol.errors import InvalidRequest
from protocol.jobs import ImageJob


def generation_size(job: ImageJob, default_side: int, limits: ImageEngineOptions) -> tuple[int, int]:
    """Return the size of a generation; a side that the job leaves out is the default one.

    Raises InvalidRequest for a size beyond the limits.
    """
    return _checked(job, (job.width or default_side, job.height or default_side), limits)


def edit_size(
    job: ImageJob, source: tuple[int, int], default_side: int, limits: ImageEngineOptions
) -> tuple[int, int]:
    """Return the size of an edit; a side that the job leaves out keeps the proportions of the source.

    Without either side the result has about as many pixels as the model's default size, fewer where the
    proportions need it. Raises InvalidRequest for a size beyond the limits.
    """
    width, height = source
    multiple = limits.size_multiple
    if not job.width and not job.height:
        return _same_shape(source, default_side**2, limits)
    return _checked(
        job,
        (
            job.width or _round(job.height * width / height if job.height else 0, multiple),
            job.height or _round(job.width * height / width if job.width else 0, multiple),
        ),
        limits,
    )


def size_problem(size: tuple[int, int], limits: ImageEngineOptions) -> str | None:
    """Return what is wrong with a size, as a sentence without its end; None if it is within the limits."""
    width, height = size
    multiple, max_side = limits.size_multiple, limits.max_side
    if any(side < multiple or side % multiple or side > max_side for side in size):
        return (
            f"{width}x{height} is not supported; width and height must be multiples of {multiple}, from"
            f" {multiple} to {max_side} pixels"
        )
    if width * height > limits.max_pixels:
        return (
            f"{width}x{height} has {width * height} pixels; this model supports at most {limits.max_pixels}"
        )
    return None


def _checked(job: ImageJob, size: tuple[int, int], limits: ImageEngineOptions) -> tuple[int, int]:
    if problem := size_problem(size, limits):
        param = "width" if job.width else "height"
        hint = "" if job.width and job.height else "; set both width and height"
        raise InvalidRequest(f"{param}: {problem}{hint}", param=param)
    return size


def _same_shape(size: tuple[int, int], pixels: int, limits: ImageEngineOptions) -> tuple[int, int]:
    """Scale `size` to about `pixels` in all, keeping its proportions as far as the limits allow."""
    multiple = limits.size_multiple
    scale = math.sqrt(pixels / (size[0] * size[1]))
    short, long = (_round(side * scale, multiple) for side in sorted(size))
    # Rounding, or a short side that can't be shorter, may lead beyond the limits.
    long = min(
        long, _round_down(limits.max_side, multiple), _round_down(limits.max_pixels // short, multiple)
    )
    return (short, long) if size[0] <= size[1] else (long, short)


def _round(side: float, multiple: int) -> int:
    """Return the multiple of `multiple` nearest to `side`, but at least `multiple`."""
    return max(1, round(side / multiple)) * multiple


def _round_down(side: int, multiple: int) -> int:
    return max(1, side // multiple) * multiple
