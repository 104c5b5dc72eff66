"""The response of an image link. It is read from Redis piece by piece, as the client takes it."""

import errno
from collections.abc import Iterator

from flask import Response

from app.http.connection import Connection
from protocol.image_store import ImageStore

PIECE_BYTES = 256 * 1024
"""What a client that reads slowly keeps in this process, however large its image is."""
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600, immutable"}


def image_file_response(store: ImageStore, name: str, connection: Connection) -> Response | None:
    """Make the response with a stored image; None if there is none of this name.

    A client that stops reading is disconnected.
    """
    size = store.size(name)
    if size is None:
        return None
    response = Response(_pieces(store, name, size), content_type="image/png", headers=_HEADERS)
    response.content_length = size
    connection.begin_sending()
    response.call_on_close(connection.end_sending)
    return response


def _pieces(store: ImageStore, name: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE_BYTES):
        piece = store.read(name, start, min(PIECE_BYTES, size - start))
        if piece is None:
            # The client knows the length, so closing the connection tells it that the image is not complete.
            raise ConnectionResetError(errno.ECONNRESET, "the image expired while it was being sent")
        yield piece
