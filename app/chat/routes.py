"""POST /v1/chat/completions."""

import time
import uuid
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, request

from app.chat.completion import completion
from app.chat.images import MAX_TOTAL_BYTES, load_images
from app.chat.messages import ImageSource
from app.chat.params import TextParams
from app.chat.response import ChatEventReader, ChunkEncoder, ChunkStream
from app.chat.resumable import NumberedChunks, is_wanted
from app.chat.schema import ChatCompletionRequest
from app.dispatch.dispatcher import Dispatcher
from app.dispatch.event_reader import EventReader
from app.dispatch.models import find_model
from app.dispatch.resumption import Resumption
from app.dispatch.worker_view import WorkerView
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.request_body import BodyReader, ignored_params, parse_json
from app.http.validation import parse
from app.http.wsgi import job_origin, name_request
from app.image_input.source import Fetch, counted
from app.respond import Chunks, respond
from catalogue import CHAT, Catalogue, ChatModelEntry
from protocol.errors import PayloadTooLarge, UnsupportedParameter
from protocol.jobs import ChatImage

MAX_TEXT_BYTES = 8 * 2**20
"""Of a body without its images."""

MAX_BODY_BYTES = MAX_TEXT_BYTES + MAX_TOTAL_BYTES * 4 // 3
MAX_DELIMITERS = 2**20
"""Commas and opening brackets of a body that is longer than MAX_TEXT_BYTES: as JSON becomes Python's objects,
most of which have fifty times the size of their text. Images in base64 have none."""


class ChatInputs(NamedTuple):
    """What turns bodies into jobs."""

    catalogue: Catalogue
    dispatcher: Dispatcher
    worker_view: WorkerView
    fetch: Fetch


def blueprint(inputs: ChatInputs, resumption: Resumption, bodies: BodyReader) -> Blueprint:
    """Make the blueprint of the chat endpoint."""
    routes = Blueprint("chat", __name__)

    @routes.post(CHAT.path)
    def create_chat_completion() -> Response:
        connection = Connection(request.environ)
        with bodies.read(request, MAX_BODY_BYTES) as body, bodies.hold() as take:
            within = inputs._replace(fetch=counted(inputs.fetch, take))
            resumable = is_wanted() and resumption.is_offered()
            params, reader = _submit(body, within, connection, resumable)
        del body
        events = ChatEventReader(reader, params.choices)
        return respond(
            params,
            reader,
            connection,
            chunks=lambda: _chunks(params, reader, events, resumption),
            body=lambda: completion(events, params.id, params.model, n=params.choices),
        )

    return routes


def _submit(
    received: bytes, inputs: ChatInputs, connection: Connection, resumable: bool
) -> tuple[TextParams, EventReader]:
    """Validate the request and queue its job. Nothing keeps its body after this returns."""
    started = time.monotonic()
    raw = _parse_json(received)
    body = parse(ChatCompletionRequest, raw)
    entry = find_model(inputs.catalogue, body.model, CHAT)
    job = body.to_job(f"cmpl-{uuid.uuid4().hex}", entry)
    resumable = resumable and bool(body.stream)
    job = msgspec.structs.replace(job, resumable=resumable, **job_origin(raw))
    name_request(job.id, job.model)
    sources = body.images()
    if len(received) - sum(len(source.url) for source in sources) > MAX_TEXT_BYTES:
        raise _too_large(received)
    if sources:
        # everything else is validated before an image is downloaded
        job = msgspec.structs.replace(job, images=_load_images(sources, entry, inputs, connection, started))
    params = TextParams(
        job.id,
        job.model,
        job.sampling.n,
        stream=bool(body.stream),
        resumable=resumable,
        include_usage=body.includes_usage,
        ignored=ignored_params(body, raw),
    )
    reader = inputs.dispatcher.begin(job, CHAT, connection, started=started)
    current_access().times = reader.timings
    return params, reader


def _parse_json(body: bytes) -> dict[str, Any]:
    """Parse a body of at most MAX_BODY_BYTES. Raises InvalidRequest, and PayloadTooLarge for one that is not
    mostly images."""
    if len(body) > MAX_TEXT_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_DELIMITERS:
        raise _too_large(body)
    return parse_json(body)


def _too_large(body: bytes) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body has {len(body)} bytes; at most {MAX_TEXT_BYTES} are accepted besides images"
    )


def _load_images(
    sources: list[ImageSource],
    entry: ChatModelEntry,
    inputs: ChatInputs,
    connection: Connection,
    started: float,
) -> list[ChatImage]:
    inputs.dispatcher.refuse_early(entry.name)
    if not inputs.worker_view.takes_images(entry.name):
        raise UnsupportedParameter(
            f"model {entry.name!r} takes no images; send text parts", param=sources[0].param
        )
    return load_images(
        sources,
        inputs.fetch,
        most=entry.engine.max_images,
        ends_at=started + CHAT.deadline_s(inputs.dispatcher.settings),
        disconnected=connection.disconnected,
    )


def _chunks(
    params: TextParams, reader: EventReader, events: ChatEventReader, resumption: Resumption
) -> Chunks:
    """Wait for the first token."""
    encoder = ChunkEncoder(
        params.id,
        params.model,
        n=params.choices,
        include_usage=params.include_usage,
        timings=reader.timings.milliseconds,
    )
    chunks = ChunkStream(events, encoder)
    if not params.resumable:
        return chunks
    resumption.begin(
        reader,
        params.model,
        n=params.choices,
        include_usage=params.include_usage,
        created=encoder.created,
    )
    return NumberedChunks(chunks)
