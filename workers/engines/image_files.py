"""Decodes image files with Pillow. Sizes are (width, height) in pixels."""

from PIL import Image, ImageOps

from protocol.errors import InvalidImage
from protocol.image_files import open_image


def decode_image(data: bytes, param: str) -> Image.Image:
    """Decode all pixels as RGB or RGBA, rotated as the EXIF orientation says.

    Raises InvalidImage, with `param` as the field at fault.
    """
    image = open_image(data, param)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey, whose values Pillow would clip to white
            upright = upright.convert("I").point(lambda value: value / 256).convert("L")
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except Exception:  # damaged data: OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidImage(f"{param} is damaged: its pixels can't be decoded", param=param) from None


def flatten(image: Image.Image) -> Image.Image:
    """Convert to RGB on a white background."""
    if image.mode == "RGB":
        return image
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    return flat
