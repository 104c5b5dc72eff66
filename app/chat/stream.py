"""The response that streams the chunks of a text."""

from collections.abc import Callable

from flask import Response, request

from app.chat.response import ChunkStream
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.sse import EventStream


def stream_response(chunks: ChunkStream, connection: Connection, close: Callable[[], None]) -> Response:
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
