"""GET /v1/models: one row for each model and endpoint, with the fields of the standard and of OpenAI."""

import time
from typing import Any

from flask import Blueprint, Response

from app.http.errors import json_response
from catalogue import TASKS, Catalogue
from protocol.errors import ModelNotFound


def blueprint(*, catalogue: Catalogue, public_url: str) -> Blueprint:
    """Make the blueprint of the model endpoints. `public_url` is the base of the models' URLs."""
    routes = Blueprint("models", __name__)
    created = int(time.time())
    rows: list[dict[str, Any]] = [
        {
            "model": entry.name,
            "url": public_url + TASKS[task].path,
            "object": "model",
            "id": entry.name,
            "created": created,
            "owned_by": catalogue.project,
            "task": task,
        }
        for entry in catalogue.models
        for task in entry.tasks
    ]

    @routes.get("/v1/models")
    def list_models() -> Response:
        return json_response(
            {"code": 0, "message": "success", "project": catalogue.project, "object": "list", "data": rows}
        )

    @routes.get("/v1/models/<path:name>")
    def retrieve_model(name: str) -> Response:
        found = next((row for row in rows if row["id"] == name), None)
        if found is None:
            raise ModelNotFound(
                f"model {name!r} does not exist; GET /v1/models lists the models", param="model"
            )
        return json_response({"code": 0, "message": "success", **found})

    return routes
