"""POST /v1/embeddings."""

import uuid
from collections.abc import Iterator
from contextlib import closing

import gevent
import msgspec
from flask import Blueprint, Response, request

from app.dispatch.dispatcher import Dispatcher
from app.dispatch.models import find_model
from app.embeddings.response import collect_vectors, embeddings_body
from app.embeddings.schema import EmbeddingRequest
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.request_body import BodyReader, ignored_params, parse_json
from app.http.validation import parse
from app.http.wsgi import add_job_headers, job_origin, name_request
from catalogue import EMBEDDING, Catalogue

MAX_BODY_BYTES = 8 * 2**20


def blueprint(*, catalogue: Catalogue, dispatcher: Dispatcher, bodies: BodyReader) -> Blueprint:
    """Make the blueprint of the embeddings endpoint."""
    routes = Blueprint("embeddings", __name__)

    @routes.post(EMBEDDING.path)
    def create_embeddings() -> Response:
        with bodies.read(request, MAX_BODY_BYTES) as content:
            raw = parse_json(content)
            body = parse(EmbeddingRequest, raw)
            job = body.to_job(f"embd-{uuid.uuid4().hex}", find_model(catalogue, body.model, EMBEDDING))
            job = msgspec.structs.replace(job, **job_origin(raw))
            ignored = ignored_params(body, raw)
            is_base64 = body.encoding_format == "base64"
        name_request(job.id, job.model)
        request_id, model, count = job.id, job.model, len(job.inputs)
        with closing(dispatcher.begin(job, EMBEDDING, Connection(request.environ))) as reader:
            current_access().times = reader.timings
            # the inputs are in Redis now
            del content, raw, body, job
            rows, usage = collect_vectors(reader, count)
        response = Response(
            _giving_way(embeddings_body(request_id, model, rows, usage, base64=is_base64)),
            content_type="application/json",
        )
        add_job_headers(response, reader.timings.milliseconds(), ignored)
        return response

    return routes


def _giving_way(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the parts, and let other requests run in between: a part that fits into the socket's buffer does
    not."""
    for part in parts:
        yield part
        gevent.sleep(0)
