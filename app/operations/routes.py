"""Endpoints for operators and monitoring: version, workers, metrics, the API's description."""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response

from app.dispatch.worker_view import WorkerView
from app.http.errors import json_response
from config import VERSION
from node.registration import has_node_type
from protocol.leases import WorkerRecord

WORKER_FIELDS = (
    "name",
    "cid",
    "model",
    "tasks",
    "pid",
    "host",
    "gpus",
    "state",
    "running",
    "slots",
    "steps",
    "kv_cache_usage",
    "gpu",
    "registered",
    "last_error",
)
"""The fields of protocol.leases.WorkerRecord that GET /v1/workers shows."""


def blueprint(
    worker_view: WorkerView, *, render_metrics: Callable[[], bytes], description: dict[str, Any]
) -> Blueprint:
    """Make the blueprint. `description`: the OpenAPI document."""
    routes = Blueprint("operations", __name__)

    @routes.get("/version")
    def version() -> Response:
        return json_response({"version": VERSION})

    @routes.get("/v1/workers")
    def workers() -> Response:
        rows = [_worker(record) for record in worker_view.records()]
        return json_response({"code": 0, "message": "success", "data": rows})

    @routes.get("/metrics")
    def show_metrics() -> Response:
        return Response(render_metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return json_response(description)

    return routes


def _worker(record: WorkerRecord) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in WORKER_FIELDS}
    if not has_node_type(record.tasks):
        row["registered"] = None
    return row
