"""Checks from its header alone whether an image file is accepted. Both sides call it; only the engine decodes
pixels.

The web process refuses early and cheaply. The worker checks again, because it does not trust what is in the
queue. The limit on pixels guards against decompression bombs, for which Pillow by itself only warns up to a
much higher limit.
"""

from io import BytesIO

from PIL import Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from protocol.errors import InvalidImage

# Otherwise Pillow imports them when it opens the first image. The web process opens images in threads of
# gevent's pool, where the locks of two imports can deadlock.
_PLUGINS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
Image.preinit()

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_777_216
"""4096 x 4096: 48 MiB as RGB, so that a hostile file can't fill a worker's memory."""
MAX_BYTES = 10 * 1024 * 1024
"""Largest size of one image file, as uploaded or fetched."""


def open_image(data: bytes, param: str = "image") -> Image.Image:
    """Open a PNG, JPEG or WEBP file with one frame and at most MAX_PIXELS, reading its header only.

    Raises InvalidImage, with `param` as the field at fault.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # The warning is raised where warnings are errors.
        raise _too_many_pixels(param) from None
    except Exception:  # a broken header makes Pillow's plugins raise many types
        raise InvalidImage(f"{param} is not a readable PNG, JPEG or WEBP image", param=param) from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(param)
    # MPO is a phone's JPEG with a preview or a depth map after the photo; its first frame is the photo.
    if frames != 1 and image.format != "MPO":
        raise InvalidImage(f"{param} has {frames} frames; send an image with one frame", param=param)
    return image


def _too_many_pixels(param: str) -> InvalidImage:
    return InvalidImage(
        f"{param} is too large; at most {MAX_PIXELS:,} pixels (4096 x 4096) are accepted", param=param
    )
