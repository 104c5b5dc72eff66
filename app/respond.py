"""The response to a request that workers answer: a stream of events, or one JSON document."""

from collections.abc import Callable
from typing import Any, Protocol

from flask import Response, request

from app.dispatch.timings import Timings
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.errors import json_response
from app.http.sse import EventStream
from app.http.wsgi import add_job_headers


class Chunks(Protocol):
    """Frames for app.http.sse.EventStream, such as app.chat.response.ChunkStream."""

    def next_frames(self) -> bytes | None: ...


class TimedReader(Protocol):
    """The part of app.dispatch.event_reader.EventReader that is needed here."""

    timings: Timings

    def close(self) -> None: ...


class ResponseParams(Protocol):
    """What is needed of a request here. `ignored`: the value of X-Ignored-Params."""

    @property
    def stream(self) -> bool: ...

    @property
    def ignored(self) -> str: ...


def respond(
    params: ResponseParams,
    reader: TimedReader,
    connection: Connection,
    *,
    chunks: Callable[[], Chunks],
    body: Callable[[], dict[str, Any]],
    typed: bool = False,
) -> Response:
    """Wait for the first events of a stream, which `chunks` does, or for the whole document, which `body`
    reads.

    `reader` is closed at the end of the stream; otherwise before this returns or raises. `typed`: that of
    EventStream.
    """
    try:
        if params.stream:
            response = stream_response(chunks(), connection, reader.close, typed=typed)
            add_job_headers(response, {}, params.ignored)
        else:
            response = json_response(body())
            add_job_headers(response, reader.timings.milliseconds(), params.ignored)
            reader.close()
    except BaseException:
        reader.close()
        raise
    return response


def stream_response(
    chunks: Chunks, connection: Connection, close: Callable[[], None], *, typed: bool = False
) -> Response:
    """Make the response. The WSGI server closes it, which calls `close`."""

    def end() -> None:
        close()
        connection.end_sending()

    connection.begin_sending()
    # gunicorn keeps the environ until the stream ends, and would keep the request and its body with it
    request.environ.pop("werkzeug.request", None)
    return Response(
        EventStream(chunks.next_frames, end, current_access().fail, typed=typed),
        content_type="text/event-stream; charset=utf-8",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        # gunicorn gets the stream itself; werkzeug's iterators around it would live as long as the stream
        direct_passthrough=True,
    )
