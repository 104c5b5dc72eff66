"""The training images of the demo image model: one coloured shape on a light background. Uses Pillow only."""

import math

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 40),
    "green": (40, 160, 70),
    "blue": (40, 75, 215),
    "yellow": (240, 205, 30),
    "orange": (240, 125, 25),
    "purple": (135, 45, 170),
    "black": (30, 30, 35),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUND: Rgb = (242, 241, 236)
NATIVE_SIZE = 64
"""Width and height in pixels of most of the training images."""

_CORNERS = {"square": 4, "triangle": 3}
_OVERSAMPLING = 4


def draw_shape(
    colour: str,
    shape: str,
    size: tuple[int, int] = (NATIVE_SIZE, NATIVE_SIZE),
    centre: tuple[float, float] = (0.5, 0.5),
    radius: float = 0.32,
    background: Rgb = BACKGROUND,
) -> Image.Image:
    """Draw one shape with smooth edges, as an RGB image of `size` (width, height) pixels.

    `centre` is given as shares of width and height. `radius`, of the circle or of the circle through the
    shape's corners, is a share of the shorter side.
    """
    width, height = (side * _OVERSAMPLING for side in size)
    x, y = centre[0] * width, centre[1] * height
    reach = radius * min(width, height)
    image = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=COLOURS[colour])
    else:
        pen.polygon(_corners(_CORNERS[shape], x, y, reach), fill=COLOURS[colour])
    return image.resize(size, Image.Resampling.BOX)


def _corners(count: int, x: float, y: float, reach: float) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon that stands on one of its sides."""
    turn = 2 * math.pi / count
    angles = [math.pi / 2 + turn * (corner + 0.5) for corner in range(count)]
    return [(x + reach * math.cos(angle), y + reach * math.sin(angle)) for angle in angles]
