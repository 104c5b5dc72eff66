"""POST /v1/chat/completions."""

import uuid
from collections.abc import Iterator
from itertools import chain

from flask import Blueprint, Response, request

from app import sse
from app.chat_answer import ChunkEncoder, completion, with_deadline
from app.connection import Connection
from app.errors import json_response
from app.request_body import ignored_params, read_json
from app.schemas.chat import ChatCompletionRequest
from app.schemas.validation import parse
from app.services import Services
from protocol.events import Event, Started

MAX_BODY_BYTES = 8 * 2**20


def blueprint(services: Services) -> Blueprint:
    routes = Blueprint("chat", __name__)

    @routes.post("/v1/chat/completions")
    def create_chat_completion() -> Response:
        raw = read_json(request, MAX_BODY_BYTES)
        body = parse(ChatCompletionRequest, raw)
        entry = services.generation.entry(body.model, "chat")
        job = body.to_job(f"cmpl-{uuid.uuid4().hex}", entry)
        connection = Connection(request.environ)
        events = services.generation.run(job, "chat", connection)
        batches = with_deadline(events, job.sampling.n)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            encoder = ChunkEncoder(job.id, job.model, n=job.sampling.n, include_usage=include_usage)
            response = _stream(batches, encoder, connection)
            response.call_on_close(events.close)
            # gunicorn keeps the environ as long as the stream lasts, and werkzeug its request in there
            request.environ.pop("werkzeug.request", None)
        else:
            response = json_response(completion(batches, job.id, job.model, n=job.sampling.n))
        if ignored := ignored_params(ChatCompletionRequest, raw):
            response.headers["X-Ignored-Params"] = ignored
        response.headers["X-Request-Id"] = job.id
        return response

    return routes


def _stream(batches: Iterator[list[Event]], encoder: ChunkEncoder, connection: Connection) -> Response:
    """The event stream. Waits for the first token before anything is sent: an error before it keeps its status."""
    first = next(batch for batch in batches if any(not isinstance(event, Started) for event in batch))
    parts = chain([encoder.opening() + encoder.frames(first)], map(encoder.frames, batches))

    def body() -> Iterator[bytes]:
        with connection.sending():
            yield from sse.stream(parts)

    return Response(
        body(),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )
