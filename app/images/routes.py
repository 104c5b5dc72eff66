"""POST /v1/images/generations, POST /v1/images/edits, GET /v1/images/files/<name>."""

import time
import uuid
from contextlib import closing

import msgspec
from flask import Blueprint, Response, request

from app.dispatch.dispatcher import Dispatcher
from app.dispatch.models import find_model, only_model
from app.http.access_log import current_access
from app.http.connection import Connection
from app.http.errors import json_response
from app.http.request_body import BodyReader, ignored_params
from app.http.validation import parse
from app.http.wsgi import add_job_headers, job_origin, name_request
from app.image_input.fetch import ImageFetcher
from app.image_input.source import counted
from app.images.body import MAX_FORM_BYTES, MAX_JSON_BYTES, ImageBody, read_image_body
from app.images.file_response import image_file_response
from app.images.response import collect_images, images_response, images_response_base64
from app.images.schema import ImageEditRequest, ImageGenerationRequest, ImageRequest
from catalogue import EDIT, GENERATION, Catalogue
from protocol.errors import NotFound
from protocol.image_store import ImageStore

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

    def create(*, edit: bool) -> Response:
        started = time.monotonic()
        # a form with an image is an edit at both endpoints, because the node knows one URL for each model
        limit = MAX_FORM_BYTES if request.mimetype == "multipart/form-data" else MAX_JSON_BYTES
        with bodies.read(request, limit) as content, bodies.hold() as take:
            body = read_image_body(request, content, edit=edit)
            params = _parse(body, catalogue)
            entry = find_model(catalogue, params.model, body.task)
            # everything is validated before an image is downloaded for this request
            job = params.to_job(f"img-{uuid.uuid4().hex}", entry)
            job = body.attach(
                msgspec.structs.replace(job, **job_origin(body.fields)), counted(fetcher.fetch, take)
            )
            name_request(job.id, job.model)
        with closing(
            dispatcher.begin(job, body.task, Connection(request.environ), started=started)
        ) as reader:
            current_access().times = reader.timings
            # The images are in Redis now; kept here too, each waiting edit would take up to 50 MiB.
            del content
            job = msgspec.structs.replace(job, image=None, mask=None)
            body = body._replace(image=None, mask=None)
            images = collect_images(reader)
        created = int(time.time())
        if params.response_format == "b64_json":
            answer = images_response_base64(created, job, images, load=image_store.get)
        else:
            answer = images_response(created, job, images, link=lambda name: public_url + FILES + name)
        response = json_response(answer)
        add_job_headers(response, reader.timings.milliseconds(), ignored_params(params, body.fields))
        return response

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


def _parse(body: ImageBody, catalogue: Catalogue) -> ImageRequest:
    """Validate the fields of a body. A form need not name the model if only one supports its task."""
    schema = ImageEditRequest if body.task is EDIT else ImageGenerationRequest
    if not body.is_form:
        return parse(schema, body.fields)
    fields = (
        body.fields if "model" in body.fields else {**body.fields, "model": only_model(catalogue, body.task)}
    )
    return parse(schema, fields, strict=False)
