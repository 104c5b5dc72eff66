"""Pixels in and out of the picture engine: a caller's files become RGB pictures and masks, results become PNG files.

Knows Pillow only. Sizes are (width, height) in pixels; masks are mode "L" with 255 where the picture may change and 0
where it must stay, nothing between.
"""

import math
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageChops, ImageOps

from protocol.errors import InvalidImage
from protocol.image_files import open_image

_PNG_COMPRESS_LEVEL = 1
"""zlib level. On a 1024 x 1024 photo level 6 takes five times as long (0.5 s of a core) for a sixth less."""


class Source(NamedTuple):
    """What an edit starts from. `mask` None: the whole picture may change."""

    image: Image.Image
    mask: Image.Image | None
    mask_requested: bool
    """The caller sent a mask of his own (else it is the picture's transparency, which may be ignored)."""


def decode_source(image_file: bytes, mask_file: bytes | None) -> Source:
    """Decode an edit's files. Raises InvalidImage for broken pixels, a mask of another size or one that marks nothing.

    Transparent pixels of the mask, or of the picture when there is no mask, say where to edit, as in OpenAI's API; in a
    mask without transparency its white does.
    """
    picture = _decode(image_file, "image")
    if mask_file is None:
        return Source(_flatten(picture), _transparent_part(picture), mask_requested=False)
    mask_picture = _decode(mask_file, "mask")
    if mask_picture.size != picture.size:
        (width, height), (mask_width, mask_height) = picture.size, mask_picture.size
        raise InvalidImage(
            f"mask is {mask_width}x{mask_height} and image {width}x{height}; both must have the same size",
            param="mask",
        )
    mask = _transparent_part(mask_picture) or _harden(mask_picture.convert("L"))
    if mask.getbbox() is None:
        raise InvalidImage("mask marks no pixel; make the part to edit transparent or white", param="mask")
    return Source(_flatten(picture), mask, mask_requested=True)


def fit(source: Source, size: tuple[int, int]) -> Source:
    """The source stretched to `size`."""
    mask = source.mask and source.mask.resize(size, Image.Resampling.NEAREST)
    return source._replace(image=_resize(source.image, size), mask=mask)


def paste_back(result: Image.Image, source: Source) -> Image.Image:
    """`result` where the mask allows a change, the source's own pixels everywhere else, at the result's size."""
    if source.mask is None:
        return result
    fitted = fit(source, result.size)
    return Image.composite(result.convert("RGB"), fitted.image, fitted.mask or result)


def same_shape(size: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """The size nearest to the proportions of `size` with about `pixels` in all and sides that `multiple` divides."""
    scale = math.sqrt(pixels / (size[0] * size[1]))
    return round_side(size[0] * scale, multiple), round_side(size[1] * scale, multiple)


def round_side(side: float, multiple: int) -> int:
    """The multiple nearest to `side`, at least one."""
    return max(1, round(side / multiple)) * multiple


def encode_png(image: Image.Image) -> bytes:
    """An RGB PNG without metadata."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=_PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def _decode(data: bytes, param: str) -> Image.Image:
    """All pixels, upright (EXIF), as RGB or RGBA."""
    picture = open_image(data, param)
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
            upright = upright.convert("I").point(lambda value: value / 256).convert("L")
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise InvalidImage(f"{param} is damaged: its pixels can't be decoded", param=param) from None


def _flatten(picture: Image.Image) -> Image.Image:
    """RGB; what shows through transparent pixels is white, as on a page."""
    if picture.mode == "RGB":
        return picture
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return page


def _transparent_part(picture: Image.Image) -> Image.Image | None:
    """The mask that the picture's transparent pixels make, None when it has none."""
    if picture.mode != "RGBA":
        return None
    mask = _harden(ImageChops.invert(picture.getchannel("A")))
    return mask if mask.getbbox() else None


def _harden(grey: Image.Image) -> Image.Image:
    # diffusers binarises masks at one half, too: what isn't denoised must not be blended either
    return grey.point(lambda value: 255 if value >= 128 else 0)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
