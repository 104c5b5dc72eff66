"""Decodes the files of a request into RGB images and masks, and encodes results (PNG) and previews (JPEG).

Uses Pillow only. Sizes are (width, height) in pixels. Masks are of mode "L" with two values: 255 where the
image may change, 0 where it must not.
"""

from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageChops

from protocol.errors import InvalidImage
from workers.engines.image_files import decode_image, flatten

_PNG_COMPRESS_LEVEL = 1
"""The zlib level. For a 1024 x 1024 photo, level 6 takes five times as long (0.5 s) and saves a sixth."""

_JPEG_QUALITY = 80
"""Of previews. Blurred noise of 1024 x 1024 pixels takes 200 to 330 KiB, as PNG 0.7 to 2.3 MiB."""


class Source(NamedTuple):
    """The decoded input of an edit. Without a mask the whole image may change."""

    image: Image.Image
    mask: Image.Image | None
    mask_requested: bool
    """The client sent a mask file. A mask made from transparent pixels of the image may be ignored."""


def decode_source(image_file: bytes, mask_file: bytes | None) -> Source:
    """Decode the files of an edit.

    The part to edit is where the mask is transparent, or the image when there is no mask, as in OpenAI's API.
    In a mask without transparent pixels it is where the mask is white.

    Raises InvalidImage when pixels can't be decoded, when the mask has another size than the image and when
    it marks no pixel.
    """
    image = decode_image(image_file, "image")
    if mask_file is None:
        return Source(flatten(image), _transparency_mask(image), mask_requested=False)
    mask_image = decode_image(mask_file, "mask")
    if mask_image.size != image.size:
        (width, height), (mask_width, mask_height) = image.size, mask_image.size
        raise InvalidImage(
            f"mask is {mask_width}x{mask_height} and image {width}x{height}; both must have the same size",
            param="mask",
        )
    mask = _transparency_mask(mask_image) or _binarize(mask_image.convert("L"))
    if mask.getbbox() is None:
        raise InvalidImage("mask marks no pixel; make the part to edit transparent or white", param="mask")
    return Source(flatten(image), mask, mask_requested=True)


def fit(source: Source, size: tuple[int, int]) -> Source:
    """Resize image and mask to `size` without keeping their proportions."""
    mask = source.mask and source.mask.resize(size, Image.Resampling.NEAREST)
    return source._replace(image=_resize(source.image, size), mask=mask)


def paste_back(result: Image.Image, source: Source) -> Image.Image:
    """Return `result` with the source's pixels, scaled to its size, where the mask forbids a change."""
    if source.mask is None:
        return result
    fitted = fit(source, result.size)
    return Image.composite(result.convert("RGB"), fitted.image, fitted.mask or result)


def encode_png(image: Image.Image) -> bytes:
    """Encode as an RGB PNG without metadata."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=_PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode as an RGB JPEG without metadata."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _transparency_mask(image: Image.Image) -> Image.Image | None:
    """Return the mask of the transparent pixels, None when there are none."""
    if image.mode != "RGBA":
        return None
    mask = _binarize(ImageChops.invert(image.getchannel("A")))
    return mask if mask.getbbox() else None


def _binarize(grey: Image.Image) -> Image.Image:
    # diffusers binarizes masks at one half too. A pixel that isn't denoised must not be blended either.
    return grey.point(lambda value: 255 if value >= 128 else 0)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
