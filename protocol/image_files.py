"""Which picture files are accepted: one judgement for both sides, from the header alone. Pixels are the engine's business.

The web side refuses early and cheaply; the worker asks again, because it trusts nobody's queue.
Source of the limits: docs/operations.md, "Pictures" (decompression bombs open with a warning only in Pillow).
"""

from io import BytesIO

from PIL import Image

from protocol.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_777_216
"""4096 x 4096: 48 MiB as RGB, so that a hostile file can't fill a worker's memory."""
MAX_BYTES = 10 * 1024 * 1024
"""Of one picture file as it arrives."""


def open_image(data: bytes, param: str = "image") -> Image.Image:
    """A PNG, JPEG or WEBP file with one frame and at most MAX_PIXELS; only its header has been read.

    Raises InvalidImage, with `param` as the field at fault.
    """
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
        frames = getattr(picture, "n_frames", 1)
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):  # the warning where warnings are errors
        raise _too_many_pixels(param) from None
    except Exception:  # Pillow's plugins raise whatever a broken header leads them to
        raise InvalidImage(f"{param} is not a readable PNG, JPEG or WEBP picture", param=param) from None
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_many_pixels(param)
    # MPO is a phone's JPEG with a preview or a depth map behind the photo; its first frame is the photo
    if frames != 1 and picture.format != "MPO":
        raise InvalidImage(f"{param} has {frames} frames; send a still picture", param=param)
    return picture


def _too_many_pixels(param: str) -> InvalidImage:
    return InvalidImage(
        f"{param} is too large: at most {MAX_PIXELS:,} pixels (4096 x 4096) are read", param=param
    )
