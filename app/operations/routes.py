"""Endpoints for operators and monitoring: health, readiness, workers, metrics, the API's description."""

from typing import Any

from flask import Blueprint, Response

from app.http.errors import json_response
from app.operations.openapi import describe
from app.services import Services


def blueprint(services: Services) -> Blueprint:
    routes = Blueprint("operations", __name__)
    description = describe(services.settings.public_url, keyed=bool(services.settings.api_keys))

    @routes.get("/healthz")
    def healthz() -> Response:
        return json_response({"code": 0, "message": "ok"})

    @routes.get("/readyz")
    def readyz() -> Response:
        worker_view = services.worker_view
        missing = worker_view.missing(services.catalogue.models)
        listening = worker_view.reachable and services.router.subscribed.is_set()
        ready = listening and not missing
        body: dict[str, Any] = (
            {"code": 0, "message": "ready"} if ready else {"code": 503, "message": "not ready"}
        )
        if services.gate.has_key():
            body |= {
                "redis": "ok" if listening else "unreachable",
                "models_without_worker": missing,
                "warnings": services.settings.warnings(),
            }
        return json_response(body, 200 if ready else 503)

    @routes.get("/v1/workers")
    def workers() -> Response:
        rows = [
            {
                "cid": record.cid,
                "model": record.model,
                "tasks": record.tasks,
                "pid": record.pid,
                "host": record.host,
                "gpus": record.gpus,
                "state": record.state,
                "running": record.running,
                "steps": record.steps,
                "registered": record.registered,
                "last_error": record.last_error,
            }
            for record in services.worker_view.records()
        ]
        return json_response({"code": 0, "message": "success", "data": rows})

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(services.metrics.render(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return json_response(description)

    return routes
