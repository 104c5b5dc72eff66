"""An image's rows of the language model's input, and the images of a prompt with their places in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

KEY_OFFSETS = 2**32
"""More than an image can have tokens."""


class Features(NamedTuple):
    """What the model's front part makes of an image and the tokens that stand for it."""

    embeds: torch.Tensor
    """[tokens, hidden size]: the input of the first layer."""
    mask: torch.Tensor | None = None
    """bool [tokens]: the tokens that `deepstack` is added to."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """For each of the first layers [tokens of the mask, hidden size]: added to its output."""

    def part(self, start: int, end: int) -> "Features":
        """The features of tokens start..end."""
        if self.mask is None:
            return Features(self.embeds[start:end])
        first, last = int(self.mask[:start].sum()), int(self.mask[:end].sum())
        deepstack = tuple(layer[first:last] for layer in self.deepstack)
        return Features(self.embeds[start:end], self.mask[start:end], deepstack)


@dataclass(eq=False, slots=True, weakref_slot=True)
class ReadImage:
    """An image that is ready for the model."""

    ids: list[int]
    """The tokens that stand for it in the prompt."""
    inputs: dict[str, torch.Tensor]
    """The arguments of the model's front part. Empty once `features` are there."""
    digest: int
    """The same for the same image, and for no other."""
    start: int = 0
    """Where its tokens begin in the prompt."""
    features: Features | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def nbytes(self) -> int:
        """The memory that it takes on the host."""
        tensors = list(self.inputs.values())
        if (features := self.features) is not None:
            tensors += [features.embeds, *features.deepstack]
        return sum(tensor.nbytes for tensor in tensors)


class PromptImages:
    """The images of one prompt, in order, and the positions of its tokens."""

    def __init__(self, images: Sequence[ReadImage], length: int, positions: np.ndarray | None) -> None:
        """`length`: of the prompt in tokens.

        `positions`: int64 [3, length], in time, height and width; None: in order.
        """
        self.images = images
        self._length = length
        self._positions = positions
        self._shift = 0 if positions is None else int(positions.max()) + 1 - length
        """From the number of a token after the prompt to its position."""

    def position(self, number: int) -> int:
        """The position of a token that is text: the same in time, height and width."""
        if self._positions is None or number >= self._length:
            return number + self._shift
        return int(self._positions[0, number])

    def positions(self, start: int, end: int) -> np.ndarray:
        """The positions of tokens start..end, int64 [3, tokens]."""
        if self._positions is None:
            return np.broadcast_to(np.arange(start, end), (3, end - start))
        after = np.arange(max(start, self._length), max(end, self._length)) + self._shift
        return np.concatenate([self._positions[:, start:end], np.broadcast_to(after, (3, len(after)))], 1)

    def within(self, start: int, end: int) -> list[ReadImage]:
        """The images of which some of the tokens start..end are part."""
        return [image for image in self.images if image.start < end and start < image.end]

    def keys(self, tokens: list[int], start: int) -> list[int]:
        """Return the tokens from `start` on, with numbers in place of images' that name the image, too."""
        keys = list(tokens)
        for image in self.within(start, start + len(tokens)):
            for number in range(max(start, image.start), min(start + len(tokens), image.end)):
                # negative, so that it is no token
                keys[number - start] = -1 - (image.digest * KEY_OFFSETS + number - image.start)
        return keys
