"""app.chat.images: the bounds on the images of one request, and what is downloaded at all."""

import base64
import io
import struct
import time
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from app.chat import images
from app.chat.images import load_images
from app.chat.messages import ImageSource
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    PayloadTooLarge,
    ServiceError,
)
from protocol.image_files import MAX_PIXELS
from protocol.jobs import ChatImage


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def png_by_its_header(width: int, height: int) -> bytes:
    """A small file whose header tells of another size."""
    data = bytearray(png())
    # IHDR's data begins at 16, after the signature, a length and the chunk's type; its checksum counts the
    # type
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Web:
    """Stands in for the web: each URL has an image, and `fetched` are those that were downloaded."""

    def __init__(self, image: bytes, after: Callable[[], None] = lambda: None) -> None:
        self._image = image
        self._after = after
        self.fetched: list[str] = []

    def fetch(self, url: str, param: str) -> bytes:
        self.fetched.append(url)
        self._after()
        return self._image

    def load(
        self, *urls: str, ends_at: float | None = None, disconnected: Callable[[], bool] = lambda: False
    ) -> list[ChatImage]:
        sources = [ImageSource(url, "auto", f"messages.0.content.{at}") for at, url in enumerate(urls)]
        return load_images(
            sources,
            self.fetch,
            most=8,
            ends_at=time.monotonic() + 60 if ends_at is None else ends_at,
            disconnected=disconnected,
        )

    def refusal(self, *urls: str, **options: object) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            self.load(*urls, **options)  # type: ignore[arg-type]
        return caught.value


def test_images_are_loaded_in_order_with_their_places():
    web = Web(png(5, 5))
    loaded = web.load(data_url(png()), "https://h/a.png")
    assert [image.data for image in loaded] == [png(), png(5, 5)]
    assert [image.param for image in loaded] == ["messages.0.content.0", "messages.0.content.1"]
    assert web.fetched == ["https://h/a.png"]


def test_too_many_images_are_refused_before_any_is_downloaded():
    web = Web(png())
    error = web.refusal(*["https://h/a.png"] * 50)
    assert type(error) is InvalidRequest
    assert error.param == "messages.0.content.8"
    assert "50" in error.message and "8" in error.message
    assert web.fetched == []


def test_a_decompression_bomb_is_refused_by_its_header():
    error = Web(png_by_its_header(100_000, 100_000)).refusal("https://h/bomb.png")
    assert isinstance(error, InvalidImage)
    assert "too large" in error.message
    assert error.param == "messages.0.content.0"


@pytest.mark.parametrize(
    "url", ["", "file:///etc/passwd", "data:image/png,abc", "data:text/plain;base64,aGk="]
)
def test_what_is_no_image_is_refused(url):
    web = Web(png())
    assert isinstance(web.refusal(url), InvalidImage)
    assert web.fetched == []


def test_the_bytes_of_all_images_are_bounded(monkeypatch):
    monkeypatch.setattr(images, "MAX_TOTAL_BYTES", 2 * len(png()))
    web = Web(png())
    web.load("https://h/1", "https://h/2")
    error = web.refusal("https://h/1", "https://h/2", "https://h/3", "https://h/4")
    assert isinstance(error, PayloadTooLarge)
    assert error.param == "messages.0.content.2"
    assert len(web.fetched) == 5, "the fourth is not downloaded any more"


def test_the_pixels_of_all_images_are_bounded():
    web = Web(png(4096, 4096))
    web.load(*["https://h/a.png"] * 4)
    error = web.refusal(*["https://h/a.png"] * 5)
    assert isinstance(error, InvalidImage)
    assert f"{4 * MAX_PIXELS:,}" in error.message


def test_downloads_end_at_the_deadline_and_with_the_client():
    web = Web(png())
    assert isinstance(web.refusal("https://h/1", ends_at=time.monotonic()), DeadlineExceeded)
    assert web.fetched == []
    left = False

    def leave() -> None:
        nonlocal left
        left = True

    web = Web(png(), leave)
    assert isinstance(web.refusal("https://h/1", "https://h/2", disconnected=lambda: left), Cancelled)
    assert web.fetched == ["https://h/1"]
