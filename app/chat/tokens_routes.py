"""POST /tokenize and POST /detokenize, which a worker answers: it alone has the tokenizer."""

import uuid
from typing import Any

import msgspec
from flask import Blueprint, Response, request

from app.chat.tokens_schema import DetokenizeRequest, TokenizeRequest
from app.dispatch.dispatcher import Dispatcher
from app.dispatch.models import find_model, only_model
from app.dispatch.timings import Timings
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.errors import json_response
from app.http.request_body import BodyReader, ignored_params, parse_json
from app.http.validation import parse
from app.http.wsgi import add_job_headers, job_origin, name_request
from catalogue import COMPLETION, DETOKENIZE_PATH, TOKENIZE_PATH, Catalogue
from protocol.events import Event, Text, Tokens

MAX_BODY_BYTES = 2 * 2**20


def blueprint(*, catalogue: Catalogue, dispatcher: Dispatcher, bodies: BodyReader) -> Blueprint:
    """Make the blueprint of the tokenizer's endpoints."""
    routes = Blueprint("tokens", __name__)

    @routes.post(TOKENIZE_PATH)
    def tokenize() -> Response:
        return _serve(TokenizeRequest, _tokens_body)

    @routes.post(DETOKENIZE_PATH)
    def detokenize() -> Response:
        return _serve(DetokenizeRequest, _text_body)

    def _serve(schema: Any, to_body: Any) -> Response:
        connection = Connection(request.environ)
        with bodies.read(request, MAX_BODY_BYTES) as data:
            raw = parse_json(data)
        body = parse(schema, raw)
        model = body.model or only_model(catalogue, COMPLETION)
        job = body.to_job(f"tok-{uuid.uuid4().hex}", find_model(catalogue, model, COMPLETION))
        job = msgspec.structs.replace(job, **job_origin(raw))
        name_request(job.id, job.model)
        # times without metrics, which count generated answers only
        reader = dispatcher.begin(job, COMPLETION, connection, Timings())
        current_access().times = reader.timings
        try:
            events = [event for batch in reader for event in batch]
        finally:
            reader.close()
        response = json_response({"code": 0, "message": "success", **to_body(events)})
        add_job_headers(response, reader.timings.milliseconds(), ignored_params(body, raw))
        return response

    return routes


def _tokens_body(events: list[Event]) -> dict[str, Any]:
    (found,) = (event for event in events if isinstance(event, Tokens))
    return {
        "count": len(found.ids),
        "max_model_len": found.max_model_len,
        "tokens": found.ids,
        "token_strs": found.strings,
    }


def _text_body(events: list[Event]) -> dict[str, Any]:
    (found,) = (event for event in events if isinstance(event, Text))
    return {"prompt": found.text}
