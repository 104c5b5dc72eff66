"""Streams of image requests: OpenAI's events for previews and images. Knows no socket and no Flask."""

import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from typing import Any

from app.dispatch.event_reader import Reader
from app.http.json import encode_json
from app.http.sse import comment, frame
from protocol.connections import queue_errors
from protocol.errors import QueueUnavailable, Unavailable
from protocol.events import Event, ImagePreview, ImageReady, Progress, Started
from protocol.jobs import ImageJob

_KINDS = {"generation": "image_generation", "edit": "image_edit"}
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's clients expect the object. Images are not counted in tokens here."""


class ImageEncoder:
    """Encodes the events of one request as frames. Files come from `load` by their names in the store."""

    def __init__(
        self,
        job: ImageJob,
        *,
        load: Callable[[str], bytes | None],
        timings: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`load` may raise redis.RedisError. `timings`: those of the response if it ended now."""
        self._kind = _KINDS[job.task]
        self._left = job.n
        self._load = load
        self._timings = timings
        self._clock = clock

    def frame(self, event: Event) -> bytes:
        """Return the frame of an event, b"" if the client sees nothing of it.

        Raises Unavailable for an image that can't be loaded; a preview is left out.
        """
        if isinstance(event, Progress):
            return comment(f"step {event.step} of {event.total}")
        if isinstance(event, ImagePreview):
            return self._preview(event)
        if isinstance(event, ImageReady):
            return self._image(event)
        return b""

    def _preview(self, preview: ImagePreview) -> bytes:
        try:
            jpeg = self._file(preview.name) if preview.name else None
        except QueueUnavailable:
            jpeg = None
        if jpeg is None:
            return b""
        fields = {"partial_image_index": preview.number}
        return self._event("partial_image", preview, jpeg, "jpeg", fields)

    def _image(self, image: ImageReady) -> bytes:
        png = self._file(image.name)
        if png is None:
            raise Unavailable("an image was evicted from the store before it could be sent; try again")
        self._left -= 1
        fields = {"seed": image.seed, "usage": _USAGE}
        if not self._left:
            fields["timings"] = self._timings()
        return self._event("completed", image, png, "png", fields)

    def _file(self, name: str) -> bytes | None:
        with queue_errors():
            return self._load(name)

    def _event(
        self, what: str, image: ImagePreview | ImageReady, file: bytes, kind: str, fields: dict[str, Any]
    ) -> bytes:
        name = f"{self._kind}.{what}"
        body = {
            "type": name,
            "b64_json": b64encode(file).decode(),
            "created_at": int(self._clock()),
            "size": f"{image.width}x{image.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": kind,
            "image_index": image.index,
            **fields,
        }
        return frame(encode_json(body), event=name)


class ImageStream:
    """Frames of an image request for app.http.sse.EventStream.

    The constructor waits for the first step: until then nothing is sent, so that an error has an HTTP status
    of its own. Raises what `reader` raises.
    """

    __slots__ = ("_encoder", "_reader", "_unsent")

    def __init__(self, reader: Reader, encoder: ImageEncoder) -> None:
        self._reader = reader
        self._encoder = encoder
        self._unsent: deque[Event] = deque()
        while all(isinstance(event, Started) for event in self._unsent):
            self._unsent = deque(reader.next_events())

    def next_frames(self) -> bytes | None:
        """Return the frame of the next event; b"" if nothing of it is visible, None after the last."""
        if not self._unsent:
            if self._reader.finished:
                return None
            self._unsent.extend(self._reader.next_events())
        # one at a time: a request may have several images of some MiB
        return self._encoder.frame(self._unsent.popleft()) if self._unsent else b""
