"""POST /v1/chat/completions."""

import uuid
from typing import NamedTuple

from flask import Blueprint, Response, request

from app.chat.response import ChatEventReader, ChunkEncoder, ChunkStream, completion
from app.chat.schema import ChatCompletionRequest
from app.dispatch.dispatcher import EventReader
from app.http.connection import Connection
from app.http.errors import json_response
from app.http.request_body import ignored_params, read_json
from app.http.sse import EventStream
from app.http.validation import parse
from app.services import Services
from catalogue import CHAT

MAX_BODY_BYTES = 8 * 2**20


def blueprint(services: Services) -> Blueprint:
    routes = Blueprint("chat", __name__)

    @routes.post(CHAT.path)
    def create_chat_completion() -> Response:
        connection = Connection(request.environ)
        asked, reader = _begin(services, connection)
        try:
            response = _respond(asked, reader, connection)
            if asked.ignored:
                response.headers["X-Ignored-Params"] = asked.ignored
            response.headers["X-Request-Id"] = asked.id
        except BaseException:
            reader.close()
            raise
        return response

    return routes


class _Asked(NamedTuple):
    """What a response needs of its request. No more is kept: thousands of streams are open at once."""

    id: str
    model: str
    n: int
    stream: bool
    include_usage: bool
    ignored: str


def _begin(services: Services, connection: Connection) -> tuple[_Asked, EventReader]:
    raw = read_json(request, MAX_BODY_BYTES)
    body = parse(ChatCompletionRequest, raw)
    job = body.to_job(f"cmpl-{uuid.uuid4().hex}", services.dispatcher.entry(body.model, CHAT))
    asked = _Asked(
        job.id,
        job.model,
        job.sampling.n,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        ignored=ignored_params(ChatCompletionRequest, raw),
    )
    return asked, services.dispatcher.begin(job, CHAT, connection)


def _respond(asked: _Asked, reader: EventReader, connection: Connection) -> Response:
    events = ChatEventReader(reader, asked.n)
    if asked.stream:
        encoder = ChunkEncoder(asked.id, asked.model, n=asked.n, include_usage=asked.include_usage)
        return _stream(ChunkStream(events, encoder), connection, reader)
    response = json_response(completion(events, asked.id, asked.model, n=asked.n))
    reader.close()
    return response


def _stream(chunks: ChunkStream, connection: Connection, reader: EventReader) -> Response:
    """Make the response that streams the chunks. The WSGI server closes it, and with it the reader."""

    def close() -> None:
        reader.close()
        connection.end_sending()

    connection.begin_sending()
    # gunicorn keeps the environ until the stream ends, and would keep the request and its body with it
    request.environ.pop("werkzeug.request", None)
    return Response(
        EventStream(chunks.next_frames, close),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        # gunicorn gets the stream itself; werkzeug's iterators around it would live as long as the stream
        direct_passthrough=True,
    )
