"""Where a finished picture's bytes go: into the store. Its event travels on with a name."""

import logging

from protocol.errors import EngineError
from protocol.events import Event, Failed, ImageReady
from protocol.image_store import ImageStore, ImageTooLarge

log = logging.getLogger(__name__)


def keep_image(store: ImageStore, event: Event) -> Event:
    """The event as it travels: a picture's has a name instead of bytes, any other is as it was. Raises RedisError."""
    if not isinstance(event, ImageReady) or not event.png:
        return event
    name = store.new_name()
    try:
        store.put(name, event.png)
    except ImageTooLarge as error:
        log.error("%s", error)
        return Failed.of(EngineError("the image is larger than this server can keep; ask for a smaller one"))
    return ImageReady(event.index, event.seed, event.width, event.height, name=name)
