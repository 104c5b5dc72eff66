"""POST /v1/workers/<worker>/drain and /resume: take a worker out of service, and let it serve again."""

from collections.abc import Callable

from flask import Blueprint, Response, request

from app.http.errors import json_response
from app.http.request_body import BodyReader, parse_json
from protocol.drains import Drains
from protocol.errors import NotFound, UnsupportedMediaType
from protocol.leases import Leases

MAX_BODY_BYTES = 1024


def blueprint(
    leases: Leases, drains: Drains, bodies: BodyReader, *, check_may_act: Callable[[], None]
) -> Blueprint:
    """Make the blueprint.

    `check_may_act` raises a ServiceError unless the current request is an operator's.
    """
    routes = Blueprint("drains", __name__)

    def check() -> None:
        check_may_act()
        # a form, which any site's page may send anywhere, can't have this type
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("the Content-Type must be application/json, and the body {}")
        with bodies.read(request, MAX_BODY_BYTES) as body:
            parse_json(body)

    def find(worker: str) -> str:
        """Return the name of a worker, by its name or cid. One under drain need not run."""
        names = {record.cid: record.name for record in leases.workers() if record.name}
        if worker in names:
            return names[worker]
        if worker in names.values() or worker in drains.names():
            return worker
        raise NotFound(f"there is no worker {worker!r}; GET /v1/workers lists them")

    def answer(name: str, *, under_drain: bool) -> Response:
        return json_response(
            {"code": 0, "message": "success", "data": {"name": name, "under_drain": under_drain}}
        )

    @routes.post("/v1/workers/<worker>/drain")
    def drain(worker: str) -> Response:
        check()
        name = find(worker)
        drains.add([name])
        return answer(name, under_drain=True)

    @routes.post("/v1/workers/<worker>/resume")
    def resume(worker: str) -> Response:
        check()
        name = find(worker)
        drains.remove([name])
        return answer(name, under_drain=False)

    return routes
