"""POST /v1/images/generations, POST /v1/images/edits, GET /v1/images/files/<name>."""

import time
import uuid
from contextlib import closing

from flask import Blueprint, Response, request

from app.http.connection import Connection
from app.http.errors import json_response
from app.http.request_body import ignored_params
from app.http.validation import parse
from app.images.body import read_image_body
from app.images.response import collect_images, images_response, images_response_base64
from app.images.schema import ImageEditRequest, ImageGenerationRequest, only_model
from app.services import Services
from catalogue import EDIT, GENERATION, ImageModelEntry, TaskSpec
from protocol.errors import NotFound
from protocol.jobs import ImageJob

FILES = "/v1/images/files/"


def blueprint(services: Services) -> Blueprint:
    routes = Blueprint("images", __name__)

    @routes.post(GENERATION.path)
    def create_image() -> Response:
        return _create(services, edit=False)

    @routes.post(EDIT.path)
    def create_image_edit() -> Response:
        return _create(services, edit=True)

    @routes.get(f"{FILES}<name>")
    def get_image_file(name: str) -> Response:
        png = services.image_store.get(name)
        if png is None:
            ttl_s = services.settings.image_ttl_s
            raise NotFound(f"no such image; links expire after {ttl_s} s, or earlier when the store is full")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600, immutable"}
        return Response(png, content_type="image/png", headers=headers)

    return routes


def _create(services: Services, *, edit: bool) -> Response:
    """Answer either endpoint. A form with an image is an edit at both, as the node knows one URL a model."""
    received = read_image_body(request, edit=edit)
    fields = received.fields
    task, schema = (
        (EDIT, ImageEditRequest) if received.task == EDIT.name else (GENERATION, ImageGenerationRequest)
    )
    if received.is_form and "model" not in fields:
        fields = {**fields, "model": only_model(services.catalogue, task)}
    body = parse(schema, fields, strict=False if received.is_form else None)
    entry = services.dispatcher.entry(body.model, task)
    # everything is validated before an image is downloaded for this request
    job = received.attach(body.to_job(f"img-{uuid.uuid4().hex}", entry), services.fetcher.fetch)
    response = json_response(_answer(services, job, task, as_base64=body.response_format == "b64_json"))
    response.headers["X-Request-Id"] = job.id
    if ignored := ignored_params(schema, received.fields):
        response.headers["X-Ignored-Params"] = ignored
    return response


def _answer(
    services: Services, job: ImageJob, task: TaskSpec[ImageModelEntry], *, as_base64: bool
) -> dict[str, object]:
    with closing(services.dispatcher.begin(job, task, Connection(request.environ))) as reader:
        images = collect_images(reader)
    created = int(time.time())
    if as_base64:
        return images_response_base64(created, job, images, load=services.image_store.get)
    link = services.settings.public_url + FILES
    return images_response(created, job, images, link=lambda name: link + name)
