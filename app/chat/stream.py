"""The response that streams the chunks of a text."""

from collections.abc import Callable
from typing import Protocol

from flask import Response, request

from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.sse import EventStream


class Chunks(Protocol):
    """Frames for app.http.sse.EventStream: app.chat.response.ChunkStream."""

    def next_frames(self) -> bytes | None: ...


def stream_response(chunks: Chunks, connection: Connection, close: Callable[[], None]) -> Response:
    """Make the response. The WSGI server closes it, which calls `close`."""

    def end() -> None:
        close()
        connection.end_sending()

    connection.begin_sending()
    # gunicorn keeps the environ until the stream ends, and would keep the request and its body with it
    request.environ.pop("werkzeug.request", None)
    return Response(
        EventStream(chunks.next_frames, end, current_access().fail),
        content_type="text/event-stream; charset=utf-8",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        # gunicorn gets the stream itself; werkzeug's iterators around it would live as long as the stream
        direct_passthrough=True,
    )
