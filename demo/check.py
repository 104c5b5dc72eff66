"""Functions that judge the images of the demo image model. They use numpy and Pillow only, so tests need no
torch.

Images of any mode are judged as RGB. The background is the median colour of the image's border; the "figure"
is all pixels that differ from it.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.shapes import COLOURS

Mask = NDArray[np.bool_]

FIGURE_DISTANCE = 90.0
"""A pixel is part of the figure when its colour is farther than this from the background, in RGB units."""
SMALLEST_FIGURE = 0.01
"""A figure that covers less than this share of the image counts as noise."""


def pixels(image: Image.Image) -> NDArray[np.float64]:
    """Return the image as float64 of [height, width, 3], 0 to 255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def figure(image: Image.Image) -> Mask:
    """Return which pixels differ from the background, as booleans of [height, width]."""
    rgb = pixels(image)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = np.median(border, axis=0)
    return np.asarray(np.linalg.norm(rgb - background, axis=-1) > FIGURE_DISTANCE)


def coverage(image: Image.Image) -> float:
    """Return the share of the image that the figure covers, 0 to 1."""
    return float(figure(image).mean())


def dominant_colour(image: Image.Image) -> str:
    """Return the name in `COLOURS` nearest to the figure's median colour, or "none" without a figure."""
    mask = figure(image)
    if mask.mean() < SMALLEST_FIGURE:
        return "none"
    colour = np.median(pixels(image)[mask], axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def roundness(image: Image.Image) -> float:
    """Return how much of the circle around it the figure fills: a disc 1, a square 0.64, a triangle 0.41.

    The circle is centred on the figure's centre of mass. Without a figure the result is 0.
    """
    rows, columns = np.nonzero(figure(image))
    if len(rows) < SMALLEST_FIGURE * image.width * image.height:
        return 0.0
    distances = np.hypot(rows - rows.mean(), columns - columns.mean())
    # Half a pixel more, because distances are measured to the centres of pixels. The farthest half percent is
    # left out: otherwise one stray pixel would decide.
    radius = float(np.percentile(distances, 99.5)) + 0.5
    return min(1.0, len(rows) / (math.pi * radius**2))


def shape_name(image: Image.Image) -> str:
    """Return what the figure resembles most: "circle", "square", "triangle", or "none" without a figure."""
    value = roundness(image)
    if value == 0.0:
        return "none"
    typical = {"circle": 0.97, "square": 0.66, "triangle": 0.43}
    return min(typical, key=lambda name: abs(typical[name] - value))


def difference(one: Image.Image, other: Image.Image, where: Mask | None = None) -> float:
    """Return the mean absolute difference of two images of one size, 0 to 255, within `where` if given."""
    gap = np.abs(pixels(one) - pixels(other)).mean(axis=-1)
    return float(gap.mean() if where is None else gap[where].mean())
