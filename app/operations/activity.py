"""GET /v1/activity: queues, times to first token and ended requests of the last minutes, of all web
processes."""

from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, Response, request

from app.dispatch.activity import FROM_THE_START, Activity, EndedRequest
from app.dispatch.worker_view import WorkerView
from app.http.access_log import Access
from app.http.errors import json_response
from protocol.drains import Drains
from protocol.errors import InvalidRequest, QueueUnavailable

SHOWN_ID = len("cmpl-") + 8
"""Characters of a request's id for those who may only look: enough to find its log line, too few to resume
its stream, for which the id is all that a service without keys asks."""


def note_ended(activity: Activity, access: Access) -> None:
    """Note a request for a job whose response has ended."""
    job = access.times
    times = job.milliseconds() if job else {}
    usage = job.usage if job else None
    incarnation_id = job.incarnation_id if job else None
    activity.note(
        EndedRequest(
            id=access.request_id,
            model=access.model or "",
            route=access.route,
            status=access.status,
            outcome=access.outcome,
            cid=incarnation_id and incarnation_id.rpartition(":")[0],
            queued_ms=times.get("queued_ms"),
            first_token_ms=times.get("first_token_ms"),
            total_ms=times.get("total_ms", round(access.seconds * 1000)),
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            images=(job.images or None) if job else None,
        )
    )


def blueprint(
    activity: Activity,
    drains: Drains,
    worker_view: WorkerView,
    *,
    check_may_look: Callable[[], None],
    may_act: Callable[[], bool],
) -> Blueprint:
    """Make the blueprint. `check_may_look` raises a ServiceError unless the current request is an operator's.

    `may_act`: whether it may also do what changes the answers of others.
    """
    routes = Blueprint("activity", __name__)

    @routes.get("/v1/activity")
    def show_activity() -> Response:
        check_may_look()
        if not worker_view.reachable:
            raise QueueUnavailable  # at once, instead of after another timeout
        try:
            found = activity.read(request.args.get("after", FROM_THE_START))
        except ValueError:
            raise InvalidRequest("after is not a `cursor` of an earlier answer", param="after") from None
        if not may_act():
            for ended in found.requests:
                ended.id = ended.id[:SHOWN_ID]
        body: dict[str, Any] = {
            "code": 0,
            "message": "success",
            "now": found.now,
            "cursor": found.cursor,
            "queues": [queue._asdict() for queue in found.queues],
            "samples": found.samples,
            "requests": found.requests,
            "under_drain": drains.names(),
        }
        return json_response(msgspec.to_builtins(body))

    return routes
