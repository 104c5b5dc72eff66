"""GET /v1/models: one row for each model, with the fields of the standard and of OpenAI."""

import time
from typing import Any

from flask import Blueprint, Response

from app.dispatch.worker_view import WorkerView
from app.http.errors import json_response
from catalogue import EDIT, TASKS, Catalogue, ModelEntry
from protocol.errors import ModelNotFound


def blueprint(*, catalogue: Catalogue, public_url: str, worker_view: WorkerView) -> Blueprint:
    """Make the blueprint of the model endpoints. `public_url` is the base of the models' URLs."""
    routes = Blueprint("models", __name__)
    created = int(time.time())

    def modalities(entry: ModelEntry) -> list[str]:
        if EDIT.name in entry.tasks:
            return ["text", "image"]
        sees = worker_view.has_ready(entry.name) and worker_view.takes_images(entry.name)
        return ["text", "image"] if sees else ["text"]

    def row(entry: ModelEntry) -> dict[str, Any]:
        endpoints = {task: public_url + TASKS[task].path for task in entry.tasks}
        return {
            "model": entry.name,
            "url": endpoints[entry.tasks[0]],
            "endpoints": endpoints,
            "object": "model",
            "id": entry.name,
            "created": created,
            "owned_by": catalogue.project,
            "task": entry.tasks[0],
            # the workers tell it once they have loaded the model; only a text model has one
            "max_model_len": worker_view.max_model_len(entry.name),
            "input_modalities": modalities(entry),
        }

    @routes.get("/v1/models")
    def list_models() -> Response:
        rows = [row(entry) for entry in catalogue.models]
        return json_response(
            {"code": 0, "message": "success", "project": catalogue.project, "object": "list", "data": rows}
        )

    @routes.get("/v1/models/<path:name>")
    def retrieve_model(name: str) -> Response:
        entry = catalogue.get(name)
        if entry is None:
            raise ModelNotFound(
                f"model {name!r} does not exist; GET /v1/models lists the models", param="model"
            )
        return json_response({"code": 0, "message": "success", **row(entry)})

    return routes
