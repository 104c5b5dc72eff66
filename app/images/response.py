"""The responses of both image endpoints: the standard's body, with links or with the PNG files as base64."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from protocol.errors import Unavailable
from protocol.events import Event, ImageReady
from protocol.jobs import ImageJob


def collect_images(batches: Iterable[list[Event]]) -> list[ImageReady]:
    """Read all events of a request and return its images by index. Raises what `batches` raises."""
    images = [event for batch in batches for event in batch if isinstance(event, ImageReady)]
    return sorted(images, key=lambda image: image.index)


def images_response(
    created: int, job: ImageJob, images: Sequence[ImageReady], *, link: Callable[[str], str]
) -> dict[str, Any]:
    """Return the body with links. `link` makes the URL of an image from its name in the store."""
    return _body(created, job, [(image, link(image.name), "") for image in images])


def images_response_base64(
    created: int, job: ImageJob, images: Sequence[ImageReady], *, load: Callable[[str], bytes | None]
) -> dict[str, Any]:
    """Return the body with PNG files, which `load` reads by name. Raises Unavailable if one is missing."""
    files = [(image, load(image.name)) for image in images]
    if any(png is None for _, png in files):
        raise Unavailable("the images were evicted from the store before they could be sent; try again")
    return _body(created, job, [(image, "", b64encode(png or b"").decode()) for image, png in files])


def _body(created: int, job: ImageJob, rows: Iterable[tuple[ImageReady, str, str]]) -> dict[str, Any]:
    data = [
        {"b64_json": b64_json, "url": url, "revised_prompt": job.prompt, "seed": image.seed}
        for image, url, b64_json in rows
    ]
    return {"code": 0, "message": "success", "created": created, "data": data}
