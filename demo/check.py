"""Measures what the demo picture model drew. numpy and Pillow only, so that tests need no torch.

An image may be anything that Pillow holds; it is judged as RGB. The "figure" is what stands out from the
ground, and the ground is the colour of most of the image's border.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.shapes import COLOURS

Mask = NDArray[np.bool_]

FIGURE_DISTANCE = 90.0
"""A pixel is part of the figure when its colour is farther than this from the ground, in RGB units."""
SMALLEST_FIGURE = 0.01
"""A figure that covers less than this part of the image is taken for noise."""


def pixels(image: Image.Image) -> NDArray[np.float64]:
    """The image as floats 0 to 255, of [height, width, 3]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def figure(image: Image.Image) -> Mask:
    """Which pixels stand out from the ground, as booleans of [height, width]."""
    rgb = pixels(image)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    ground = np.median(border, axis=0)
    return np.asarray(np.linalg.norm(rgb - ground, axis=-1) > FIGURE_DISTANCE)


def coverage(image: Image.Image) -> float:
    """The part of the image that the figure covers, 0 to 1."""
    return float(figure(image).mean())


def dominant_colour(image: Image.Image) -> str:
    """The name in ``COLOURS`` nearest to the figure's median colour, or "none" without a figure."""
    mask = figure(image)
    if mask.mean() < SMALLEST_FIGURE:
        return "none"
    colour = np.median(pixels(image)[mask], axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def roundness(image: Image.Image) -> float:
    """How much of the circle around the figure it fills: a disc 1, a square 0.64, a triangle 0.41.

    0 without a figure. The circle lies around the figure's centre of mass.
    """
    rows, columns = np.nonzero(figure(image))
    if len(rows) < SMALLEST_FIGURE * image.width * image.height:
        return 0.0
    distances = np.hypot(rows - rows.mean(), columns - columns.mean())
    # Half a pixel more, for distances are measured to the middles of pixels. The last half percent is
    # left out: a stray pixel far away would decide alone.
    radius = float(np.percentile(distances, 99.5)) + 0.5
    return min(1.0, len(rows) / (math.pi * radius**2))


def shape_name(image: Image.Image) -> str:
    """What the figure looks most like: "circle", "square", "triangle", or "none" without a figure."""
    value = roundness(image)
    if value == 0.0:
        return "none"
    typical = {"circle": 0.97, "square": 0.66, "triangle": 0.43}
    return min(typical, key=lambda name: abs(typical[name] - value))


def difference(one: Image.Image, other: Image.Image, where: Mask | None = None) -> float:
    """The mean absolute difference of two images of one size, 0 to 255; of ``where`` alone if given."""
    gap = np.abs(pixels(one) - pixels(other)).mean(axis=-1)
    return float(gap.mean() if where is None else gap[where].mean())
