"""Moves the bytes of a generated image into the store. The event goes on with the image's name instead."""

import logging

import msgspec

from protocol.errors import EngineError, Overloaded
from protocol.events import Event, Failed, ImagePreview, ImageReady
from protocol.image_store import ImageStore, ImageTooLarge, StoreFull

log = logging.getLogger(__name__)

PREVIEW_TTL_S = 60
"""A web process fetches a preview when its event arrives. What expires first makes room in a full store."""


def keep_image(store: ImageStore, event: Event) -> Event:
    """Return the event to send: an image with a name instead of bytes, any other event unchanged.

    An image for which the store has no room becomes a Failed event, and a preview one without a name. Raises
    RedisError.
    """
    if isinstance(event, ImagePreview):
        return _keep_preview(store, event) if event.jpeg else event
    if not isinstance(event, ImageReady) or not event.png:
        return event
    name = store.new_name()
    try:
        store.put(name, event.png)
    except ImageTooLarge as error:
        log.error("%s", error)
        message = "the image is larger than this server can store; ask for a smaller one"
        return Failed.of(EngineError(message))
    except StoreFull as error:
        log.error("%s", error)
        return Failed.of(Overloaded("there is no memory for more images at the moment; try again later"))
    return ImageReady(event.index, event.seed, event.width, event.height, name=name)


def _keep_preview(store: ImageStore, event: ImagePreview) -> ImagePreview:
    name = store.new_name()
    try:
        store.put(name, event.jpeg, PREVIEW_TTL_S)
    except (ImageTooLarge, StoreFull) as error:
        log.warning("a preview is not sent: %s", error)
        name = ""
    return msgspec.structs.replace(event, jpeg=b"", name=name)
