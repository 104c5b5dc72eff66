"""Loads the images of requests: files of a form, base64, data URLs and links."""

import base64
import binascii
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, cast

from gevent import get_hub, monkey

from protocol.errors import InvalidImage, PayloadTooLarge
from protocol.image_files import MAX_BYTES, open_image

Fetch = Callable[[str, str], bytes]
"""Downloads a URL, given for the named field (app.image_input.fetch.ImageFetcher.fetch)."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


def counted(fetch: Fetch, take: Callable[[int], None]) -> Fetch:
    """Return `fetch` that takes the bytes of each image from a budget
    (app.http.request_body.BodyReader.hold)."""

    def fetch_and_take(url: str, param: str) -> bytes:
        data = fetch(url, param)
        take(len(data))
        return data

    return fetch_and_take


class LoadedImage(NamedTuple):
    """An image file whose header was checked."""

    data: bytes
    pixels: int


def load_image(source: bytes | str, param: str, fetch: Fetch) -> LoadedImage:
    """Load an image given as a file, a URL, a data: URL or base64, and check its header.

    Raises InvalidImage, PayloadTooLarge and Overloaded, with `param` as the field at fault.
    """
    if isinstance(source, str):
        source = source.strip()
        is_link = source[:8].lower().startswith(("http://", "https://"))
        source = fetch(source, param) if is_link else _off_loop(_decode_base64, source, param)
    if len(source) > MAX_BYTES:
        raise PayloadTooLarge(
            f"{param} has {len(source)} bytes; at most {MAX_BYTES} are accepted", param=param
        )
    # Pillow decompresses text chunks, profiles and EXIF with the header: up to a second for hostile files
    image = _off_loop(open_image, source, param)
    return LoadedImage(source, image.width * image.height)


def _decode_base64(text: str, param: str) -> bytes:
    """Decode a data: URL or plain base64. White space and missing padding are accepted."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidImage(
                f"{param} is a data: URL without base64; send data:image/png;base64,...", param=param
            )
    packed = "".join(text.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImage(f"{param} must be an http(s) URL, a data: URL or base64", param=param) from None


def _off_loop(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a function that takes CPU time in gevent's thread pool, so that it does not delay other requests.

    Without gevent it runs in the current thread, which delays no other request.
    """

    def attempt() -> tuple[_T, None] | tuple[None, Exception]:
        try:
            return function(*args, **kwargs), None
        except Exception as error:  # returned, because gevent prints exceptions that leave its threads
            return None, error

    if not monkey.is_module_patched("threading"):
        return function(*args, **kwargs)
    result, error = get_hub().threadpool.apply(attempt)
    if error is not None:
        raise error
    return cast("_T", result)
