"""The span of a request that has a job. OpenTelemetry is imported only where traces are wanted."""

import time
from typing import Any

from flask import Flask, request

from app.http.access_log import COMPLETED, Access, current_access


class RequestTraces:
    """Begins and ends spans of requests, once `start` was called; before, and without an endpoint, there are
    none."""

    def __init__(self, endpoint: str, web_id: str) -> None:
        """`endpoint`: of a collector, "" for no traces."""
        self._endpoint = endpoint
        self._web_id = web_id
        self._traces: Any = None

    def start(self) -> None:
        """Begin to make spans. Called after the fork."""
        if self._endpoint:
            from protocol.traces import Traces

            self._traces = Traces(self._endpoint, process="web", instance=self._web_id)

    def stop(self) -> None:
        """Send the spans that are left."""
        if self._traces is not None:
            self._traces.stop()

    def init_app(self, app: Flask) -> None:
        """Begin a span for each request that may have a job."""
        app.before_request(self._begin)

    def _begin(self) -> None:
        if self._traces is None or request.method != "POST" or request.url_rule is None:
            return
        from opentelemetry.trace import SpanKind

        from protocol.traces import traceparent_of

        access = current_access()
        began_ns = time.time_ns() - int(access.seconds * 1e9)
        name = f"POST {request.url_rule.rule}"
        given = request.headers.get("traceparent")
        access.span = self._traces.begin(name, given, at_ns=began_ns, kind=SpanKind.SERVER)
        access.traceparent = traceparent_of(access.span)

    def end(self, access: Access) -> None:
        """End the span of a request whose response has ended."""
        if access.span is None:
            return
        from protocol.traces import describe

        describe(
            access.span,
            access.outcome,
            completed=access.outcome == COMPLETED,
            http__request__method=access.method,
            http__route=access.route,
            http__response__status_code=access.status,
            gen_ai__request__model=access.model,
            modelservice__request_id=access.request_id,
        )
        access.span.end()
