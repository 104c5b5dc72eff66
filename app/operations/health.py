"""The endpoints that say whether this process runs, and whether requests can be served."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from flask import Blueprint, Response, request

from app.dispatch.worker_view import WorkerView
from app.http.errors import json_response
from catalogue import ModelEntry


def blueprint(
    models: Sequence[ModelEntry],
    worker_view: WorkerView,
    *,
    namespace: str,
    redis_state: Callable[[], str],
    draining_for_s: Callable[[], float],
    has_key: Callable[[], bool],
    warnings: Callable[[], list[str]],
) -> Blueprint:
    """Make the blueprint.

    `redis_state`: "ok" if requests can be dispatched, or what keeps them from it. `draining_for_s`: above 0
    once this process stops. `has_key`: whether the current request may see the details of /readyz, among them
    the `warnings`.
    """
    routes = Blueprint("health", __name__)

    @routes.get("/healthz")
    def healthz() -> Response:
        body: dict[str, Any] = {"code": 0, "message": "ok"}
        if "namespace" in request.args or "model" in request.args:
            # a worker asks this before it registers: the node must not be sent to another deployment
            known = request.args.get("model") in [entry.name for entry in models]
            body["serves"] = known and request.args.get("namespace") == namespace
        return json_response(body)

    @routes.get("/readyz")
    def readyz() -> Response:
        missing = worker_view.missing(models)
        redis = redis_state()
        ready = redis == "ok" and not missing
        body: dict[str, Any] = (
            {"code": 0, "message": "ready"} if ready else {"code": 503, "message": "not ready"}
        )
        if has_key():
            body |= {
                "redis": redis,
                "models_without_worker": missing,
                # scripts/run asks whether it is its own web process that answers
                "master_pid": os.getppid(),
                "warnings": warnings(),
            }
        return json_response(body, 200 if ready else 503)

    @routes.get("/health")
    @routes.get("/ping")
    def health() -> Response:
        served = len(worker_view.missing(models)) < len(models)
        can_serve = redis_state() == "ok" and served and not draining_for_s()
        response = Response(status=200 if can_serve else 503)
        del response.headers["Content-Type"]  # there is no body, as in vLLM's answers
        return response

    return routes
