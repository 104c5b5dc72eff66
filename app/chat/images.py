"""Loads the images of a chat's messages, within bounds for all of them together."""

import time
from collections.abc import Callable, Sequence

from app.chat.messages import ImageSource
from app.image_input.source import Fetch, load_image
from protocol.errors import Cancelled, DeadlineExceeded, InvalidImage, InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES, MAX_PIXELS
from protocol.jobs import ChatImage

MAX_TOTAL_BYTES = 2 * MAX_BYTES
"""Of the files of one request: what an edit may have."""

MAX_TOTAL_PIXELS = 4 * MAX_PIXELS


def load_images(
    sources: Sequence[ImageSource],
    fetch: Fetch,
    *,
    most: int,
    ends_at: float,
    disconnected: Callable[[], bool],
) -> list[ChatImage]:
    """Load images one after another and check their headers.

    `most`: of them. `ends_at`: the request's deadline, by the monotonic clock. Raises InvalidRequest,
    InvalidImage, PayloadTooLarge, Overloaded, DeadlineExceeded, and Cancelled if the client disconnects.
    """
    if len(sources) > most:
        raise InvalidRequest(
            f"the messages have {len(sources)} images; this model takes at most {most}",
            param=sources[most].param,
        )
    images: list[ChatImage] = []
    total_bytes = total_pixels = 0
    for url, detail, param in sources:
        if disconnected():
            raise Cancelled
        if time.monotonic() >= ends_at:
            raise DeadlineExceeded
        image = load_image(url, param, fetch)
        total_bytes += len(image.data)
        total_pixels += image.pixels
        if total_bytes > MAX_TOTAL_BYTES:
            raise PayloadTooLarge(
                f"the images of the messages have more than {MAX_TOTAL_BYTES} bytes together", param=param
            )
        if total_pixels > MAX_TOTAL_PIXELS:
            raise InvalidImage(
                f"the images of the messages have more than {MAX_TOTAL_PIXELS:,} pixels together", param=param
            )
        images.append(ChatImage(data=image.data, detail=detail, param=param))
    return images
