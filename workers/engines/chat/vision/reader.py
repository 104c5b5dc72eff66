"""Reads the images of a prompt: decoding, scaling, the model's processor, and their places.

Runs in the threads that submit, never in the engine thread.
"""

import hashlib
import inspect
import math
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image

from protocol.errors import InvalidImage, InvalidRequest, Overloaded
from protocol.jobs import ChatImage
from workers.engines.chat.vision.features import PromptImages, ReadImage
from workers.engines.image_files import decode_image, flatten
from workers.engines.load_errors import memory_of_own

HOST_FRACTION = 0.1
"""Of the machine's memory, for images that wait for the engine and for what it has computed of them."""

LOW_DETAIL_PIXELS = 512 * 512
"""The largest image with `detail` "low"."""

PROPORTIONS = ((1, 1), (4, 3), (3, 2), (2, 1), (5, 2), (3, 1), (4, 1), (6, 1), (12, 1))
"""Of the images that are tried to find the largest. A family that cuts an image into tiles may make more of a
long one: InternVL makes 9 tiles of a square, and 12 of 4:3, its most."""

PROCESSOR_ERRORS = (ValueError, TypeError, ZeroDivisionError, IndexError, AttributeError, RuntimeError)
"""What processors raise for an image that they can't resize, one that is very long for example."""


class ImageReader:
    """Reads images for one model. Any number of threads may use it at once."""

    def __init__(
        self,
        processor: Any,
        front: Any,
        input_names: frozenset[str],
        *,
        max_pixels: int,
        max_bytes: int | None = None,
    ) -> None:
        """`processor`, `front`: the model's processor and front part (transformers' model without its head).

        `input_names`: of the front part's arguments. `max_pixels`: larger images are scaled down to it.
        `max_bytes`: of the memory for the images of all requests; None: HOST_FRACTION of the machine's.
        """
        host = memory_of_own(torch.device("cpu"))
        self._max_bytes = int(host * HOST_FRACTION) if max_bytes is None else max_bytes
        self._held: WeakSet[ReadImage] = WeakSet()
        """The images of all requests that have not ended."""
        self._processor = processor
        self._rope = getattr(front, "get_rope_index", None)
        self._rope_names = frozenset(inspect.signature(self._rope).parameters) if self._rope else frozenset()
        self._input_names = input_names - {"input_ids", "attention_mask", "mm_token_type_ids"}
        self._takes_types = "mm_token_type_ids" in input_names
        self.max_pixels = max_pixels
        self.placeholder: str = processor.image_token
        """What chat templates write for an image."""
        self.placeholder_id: int = processor.tokenizer.convert_tokens_to_ids(self.placeholder)
        self._lock = threading.Lock()
        """One image at a time: a decoded one may have 64 MiB, and the processor's tokenizer isn't
        thread-safe."""

    def read(self, image: ChatImage, others: Sequence[ReadImage] = ()) -> ReadImage:
        """Decode an image and let the processor prepare it.

        `others`: those of its request that were read before.

        Raises InvalidImage, InvalidRequest if the request's images take more memory than those of all
        requests may, and Overloaded while other requests' leave too little.
        """
        with self._lock:
            pixels = self._scaled(flatten(decode_image(image.data, image.param)), image.detail)
            try:
                ids, inputs = self._process(pixels)
            except PROCESSOR_ERRORS as error:
                raise InvalidImage(
                    f"{image.param}: the model can't take an image of {pixels.width}x{pixels.height} pixels;"
                    " send one of other proportions",
                    param=image.param,
                ) from error
            digest = hashlib.sha256(image.data + image.detail.encode()).digest()[:16]
            read = ReadImage(ids, inputs, int.from_bytes(digest))
            if read.nbytes + sum(other.nbytes for other in others) > self._max_bytes:
                raise InvalidRequest(
                    f"the images of the request take more than the {self._max_bytes >> 20} MiB that this worker has"
                    " for images; send fewer or smaller ones",
                    param=image.param,
                )
            if read.nbytes + self.held_bytes > self._max_bytes:
                raise Overloaded("too many images wait for this model; try again soon", retry_after_s=5)
            self._held.add(read)
        return read

    def sample(self, data: bytes) -> ReadImage:
        """Read an image that is no request's, and so doesn't count among theirs. `data`: of its file."""
        read = self.read(ChatImage(data=data, param="image"))
        self._held.discard(read)
        return read

    def largest(self) -> ReadImage:
        """Return the image of which the processor makes the most, of those with PROPORTIONS and
        `max_pixels`."""
        found: list[ReadImage] = []
        for width, height in PROPORTIONS:
            side = math.sqrt(self.max_pixels / (width * height))
            image = Image.new("RGB", (int(width * side), max(1, int(height * side))))
            try:
                found.append(ReadImage(*self._process(image), digest=0))
            except PROCESSOR_ERRORS:
                continue  # requests with such an image are refused
            found = [max(found, key=lambda read: (len(read.ids), read.nbytes))]
        return found[0]

    @property
    def held_bytes(self) -> int:
        """The memory that the images of requests take."""
        return sum(image.nbytes for image in self._held)

    def place(self, prompt: list[int], images: list[ReadImage]) -> tuple[list[int], PromptImages]:
        """Put the images' tokens in place of the placeholders of a prompt. Raises InvalidRequest."""
        places = [at for at, token in enumerate(prompt) if token == self.placeholder_id]
        if len(places) != len(images):
            raise InvalidRequest(
                f"the model's chat template places {len(places)} images for {len(images)} in the messages;"
                " send them in messages with the role user",
                param="messages",
            )
        ids: list[int] = []
        done = 0
        for at, image in zip(places, images, strict=True):
            ids += prompt[done:at]
            image.start = len(ids)
            ids += image.ids
            done = at + 1
        ids += prompt[done:]
        if done == len(prompt):
            raise InvalidRequest(
                "the model's chat template ends the prompt with an image; send text after it",
                param="messages",
            )
        return ids, PromptImages(images, len(ids), self._positions(ids, images))

    def _scaled(self, image: Image.Image, detail: str) -> Image.Image:
        most = min(self.max_pixels, LOW_DETAIL_PIXELS) if detail == "low" else self.max_pixels
        factor = math.sqrt(most / (image.width * image.height))
        if factor >= 1:
            return image
        size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
        return image.resize(size, Image.Resampling.BICUBIC)

    def _process(self, image: Image.Image) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Return an image's tokens and the arguments of the front part."""
        made = self._processor(
            text=[self.placeholder], images=[image], return_tensors="pt", add_special_tokens=False
        )
        ids: list[int] = made["input_ids"][0].tolist()
        inputs = {name: made[name] for name in made if name in self._input_names}
        if self._takes_types:
            inputs["mm_token_type_ids"] = self._types(ids)
        return ids, inputs

    def _types(self, ids: list[int]) -> torch.Tensor:
        """int64 [1, tokens]: 1 for the tokens that stand for parts of an image."""
        return (torch.tensor([ids]) == self.placeholder_id).long()

    def _positions(self, ids: list[int], images: list[ReadImage]) -> np.ndarray | None:
        """The positions of all tokens, int64 [3, tokens]; None for a model that counts them in order."""
        if self._rope is None:
            return None
        names = self._rope_names & set().union(*(image.inputs for image in images)) - {"mm_token_type_ids"}
        grids = {name: torch.cat([image.inputs[name] for image in images]) for name in names}
        positions, _ = self._rope(torch.tensor([ids]), mm_token_type_ids=self._types(ids), **grids)
        found: np.ndarray = positions[-3:, 0].numpy()
        return found
