"""POST /v1/images/generations, POST /v1/images/edits, GET /v1/images/files/<name>."""

import time
import uuid
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, request

from app.dispatch.dispatcher import Dispatcher
from app.dispatch.event_reader import EventReader
from app.dispatch.models import find_model, only_model
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.request_body import BodyReader, ignored_params
from app.http.validation import parse
from app.http.wsgi import job_origin, name_request
from app.image_input.fetch import ImageFetcher
from app.image_input.source import counted
from app.images.body import MAX_FORM_BYTES, MAX_JSON_BYTES, ImageBody, read_image_body
from app.images.file_response import image_file_response
from app.images.response import collect_images, images_response, images_response_base64
from app.images.schema import ImageEditRequest, ImageGenerationRequest, ImageRequest
from app.images.stream import ImageEncoder, ImageStream
from app.respond import respond
from catalogue import EDIT, GENERATION, Catalogue
from protocol.errors import NotFound
from protocol.image_store import ImageStore
from protocol.jobs import ImageJob

FILES = "/v1/images/files/"


def blueprint(
    *,
    catalogue: Catalogue,
    dispatcher: Dispatcher,
    bodies: BodyReader,
    fetcher: ImageFetcher,
    image_store: ImageStore,
    image_ttl_s: int,
    public_url: str,
) -> Blueprint:
    """Make the blueprint of the image endpoints. `public_url` is the base of the links in responses."""
    routes = Blueprint("images", __name__)
    inputs = _Inputs(catalogue, dispatcher, bodies, fetcher)
    link_base = public_url + FILES

    def create(*, edit: bool) -> Response:
        connection = Connection(request.environ)
        params, reader = _submit(inputs, connection, edit=edit)
        return respond(
            params,
            reader,
            connection,
            chunks=lambda: _stream(params.job, reader, image_store),
            body=lambda: _images(params, reader, image_store, link_base),
            typed=True,
        )

    @routes.post(GENERATION.path)
    def create_image() -> Response:
        return create(edit=False)

    @routes.post(EDIT.path)
    def create_image_edit() -> Response:
        return create(edit=True)

    @routes.get(f"{FILES}<name>")
    def get_image_file(name: str) -> Response:
        response = image_file_response(image_store, name, Connection(request.environ))
        if response is None:
            raise NotFound(
                f"no such image; links expire after {image_ttl_s} s, or earlier when the store is full"
            )
        return response

    return routes


class _Inputs(NamedTuple):
    """What turns bodies into jobs."""

    catalogue: Catalogue
    dispatcher: Dispatcher
    bodies: BodyReader
    fetcher: ImageFetcher


class _ResponseParams(NamedTuple):
    """What a response needs of its request. `job` has no files."""

    job: ImageJob
    stream: bool
    response_format: str | None
    ignored: str


def _submit(inputs: _Inputs, connection: Connection, *, edit: bool) -> tuple[_ResponseParams, EventReader]:
    """Validate the request and queue its job.

    Nothing keeps its files after this returns: they are in Redis then, and in this process each waiting edit
    would take up to 50 MiB.
    """
    started = time.monotonic()
    # a form with an image is an edit at both endpoints, because the node knows one URL for each model
    limit = MAX_FORM_BYTES if request.mimetype == "multipart/form-data" else MAX_JSON_BYTES
    with inputs.bodies.read(request, limit) as content, inputs.bodies.hold() as take:
        body = read_image_body(request, content, edit=edit)
        fields = _parse(body, inputs.catalogue)
        entry = find_model(inputs.catalogue, fields.model, body.task)
        # everything is validated before an image is downloaded for this request
        job = fields.to_job(f"img-{uuid.uuid4().hex}", entry)
        job = body.attach(
            msgspec.structs.replace(job, **job_origin(body.fields)), counted(inputs.fetcher.fetch, take)
        )
        name_request(job.id, job.model)
    params = _ResponseParams(
        msgspec.structs.replace(job, image=None, mask=None),
        stream=bool(fields.stream),
        response_format=fields.response_format,
        ignored=ignored_params(fields, body.fields),
    )
    reader = inputs.dispatcher.begin(job, body.task, connection, started=started)
    current_access().times = reader.timings
    return params, reader


def _stream(job: ImageJob, reader: EventReader, image_store: ImageStore) -> ImageStream:
    """Wait for the first step."""
    encoder = ImageEncoder(job, load=image_store.get, timings=reader.timings.milliseconds)
    return ImageStream(reader, encoder)


def _images(
    params: _ResponseParams, reader: EventReader, image_store: ImageStore, link_base: str
) -> dict[str, Any]:
    """Wait for all images and return the body."""
    images = collect_images(reader)
    created = int(time.time())
    if params.response_format == "b64_json":
        return images_response_base64(created, params.job, images, load=image_store.get)
    return images_response(created, params.job, images, link=lambda name: link_base + name)


def _parse(body: ImageBody, catalogue: Catalogue) -> ImageRequest:
    """Validate the fields of a body. A form need not name the model if only one supports its task."""
    schema = ImageEditRequest if body.task is EDIT else ImageGenerationRequest
    if not body.is_form:
        return parse(schema, body.fields)
    fields = (
        body.fields if "model" in body.fields else {**body.fields, "model": only_model(catalogue, body.task)}
    )
    return parse(schema, fields, strict=False)
