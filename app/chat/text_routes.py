"""POST /v1/completions."""

import uuid
from typing import Any

import msgspec
from flask import Blueprint, Response, request

from app.chat.joined_reader import JoinedReader
from app.chat.params import TextParams
from app.chat.response import ChunkStream
from app.chat.text_response import TextChunkEncoder, text_completion
from app.chat.text_schema import CompletionRequest
from app.dispatch.dispatcher import Dispatcher
from app.dispatch.models import find_model
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.request_body import BodyReader, ignored_params, parse_json
from app.http.validation import parse
from app.http.wsgi import job_origin, name_request
from app.respond import respond
from catalogue import COMPLETION, Catalogue

MAX_BODY_BYTES = 8 * 2**20


def blueprint(*, catalogue: Catalogue, dispatcher: Dispatcher, bodies: BodyReader) -> Blueprint:
    """Make the blueprint of the completions endpoint."""
    routes = Blueprint("completions", __name__)

    @routes.post(COMPLETION.path)
    def create_completion() -> Response:
        connection = Connection(request.environ)
        with bodies.read(request, MAX_BODY_BYTES) as body:
            params, reader = _submit(parse_json(body), catalogue, dispatcher, connection)
        del body
        return respond(
            params,
            reader,
            connection,
            chunks=lambda: _chunks(params, reader),
            body=lambda: text_completion(reader, params.id, params.model, choices=params.choices),
        )

    return routes


def _submit(
    raw: dict[str, Any], catalogue: Catalogue, dispatcher: Dispatcher, connection: Connection
) -> tuple[TextParams, JoinedReader]:
    """Validate the request and queue its jobs. Nothing keeps its body after this returns."""
    body = parse(CompletionRequest, raw)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    jobs = body.to_jobs(request_id, find_model(catalogue, body.model, COMPLETION))
    n, origin = jobs[0].sampling.n, job_origin(raw)
    jobs = [msgspec.structs.replace(job, **origin) for job in jobs]
    name_request(request_id, jobs[0].model)
    params = TextParams(
        request_id,
        jobs[0].model,
        len(jobs) * n,
        stream=bool(body.stream),
        include_usage=body.includes_usage,
        ignored=ignored_params(body, raw),
    )
    reader = JoinedReader(
        dispatcher.begin_all(jobs, COMPLETION, connection), n, first_checks=bool(jobs[0].checked)
    )
    current_access().times = reader.timings
    return params, reader


def _chunks(params: TextParams, reader: JoinedReader) -> ChunkStream:
    """Wait for the first token."""
    encoder = TextChunkEncoder(
        params.id,
        params.model,
        n=params.choices,
        include_usage=params.include_usage,
        timings=reader.timings.milliseconds,
    )
    return ChunkStream(reader, encoder)
