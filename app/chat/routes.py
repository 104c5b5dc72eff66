"""POST /v1/chat/completions."""

import uuid
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, request

from app.chat.completion import completion
from app.chat.response import ChatEventReader, ChunkEncoder, ChunkStream
from app.chat.schema import ChatCompletionRequest
from app.chat.stream import stream_response
from app.dispatch.dispatcher import Dispatcher, EventReader
from app.dispatch.models import find_model
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.errors import json_response
from app.http.request_body import BodyReader, ignored_params, parse_json, wallet_sha256
from app.http.validation import parse
from app.http.wsgi import add_timings, name_request
from catalogue import CHAT, Catalogue

MAX_BODY_BYTES = 8 * 2**20


def blueprint(*, catalogue: Catalogue, dispatcher: Dispatcher, bodies: BodyReader) -> Blueprint:
    """Make the blueprint of the chat endpoint."""
    routes = Blueprint("chat", __name__)

    @routes.post(CHAT.path)
    def create_chat_completion() -> Response:
        connection = Connection(request.environ)
        with bodies.read(request, MAX_BODY_BYTES) as body:
            params, reader = _submit(parse_json(body), catalogue, dispatcher, connection)
        del body
        try:
            response = _respond(params, reader, connection)
            if params.ignored:
                response.headers["X-Ignored-Params"] = params.ignored
        except BaseException:
            reader.close()
            raise
        return response

    return routes


class _ResponseParams(NamedTuple):
    """What a response needs of its request. No more is kept: thousands of streams are open at once."""

    id: str
    model: str
    n: int
    stream: bool
    include_usage: bool
    ignored: str


def _submit(
    raw: dict[str, Any], catalogue: Catalogue, dispatcher: Dispatcher, connection: Connection
) -> tuple[_ResponseParams, EventReader]:
    """Validate the request and queue its job. Nothing keeps its body after this returns."""
    body = parse(ChatCompletionRequest, raw)
    job = body.to_job(f"cmpl-{uuid.uuid4().hex}", find_model(catalogue, body.model, CHAT))
    job = msgspec.structs.replace(job, wallet_sha256=wallet_sha256(raw))
    name_request(job.id, job.model)
    params = _ResponseParams(
        job.id,
        job.model,
        job.sampling.n,
        stream=bool(body.stream),
        include_usage=body.includes_usage,
        ignored=ignored_params(body, raw),
    )
    reader = dispatcher.begin(job, CHAT, connection)
    current_access().times = reader.timings
    return params, reader


def _respond(params: _ResponseParams, reader: EventReader, connection: Connection) -> Response:
    """Wait for the first token of a stream, or for the whole completion."""
    events = ChatEventReader(reader, params.n)
    if params.stream:
        encoder = ChunkEncoder(
            params.id,
            params.model,
            n=params.n,
            include_usage=params.include_usage,
            timings=reader.timings.milliseconds,
        )
        return stream_response(ChunkStream(events, encoder), connection, reader.close)
    response = json_response(completion(events, params.id, params.model, n=params.n))
    add_timings(response, reader.timings.milliseconds())
    reader.close()
    return response
