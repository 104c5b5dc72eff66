"""Traces for OpenTelemetry: a span for each request that has a job, and below it those of the job in its
worker.

Imported only where traces are wanted. A job carries the `traceparent` (W3C Trace Context) of its request's
span.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from config import VERSION

log = logging.getLogger(__name__)

EXPORT_S = 3.0
"""The longest a collector may take for one batch."""
STOP_S = 2.0
"""The longest an ending process waits for a collector."""

LIBRARY_LOGS = (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal")
"""Of the loggers that tell of each batch and of each span that is lost."""

_propagator = TraceContextTextMapPropagator()


class _Exporter(SpanExporter):
    """Sends spans to a collector. Logs once when that begins to fail, and once when it succeeds again.

    OpenTelemetry would log each batch: a line every few seconds while a collector is away.
    """

    def __init__(self, url: str) -> None:
        self._exporter = OTLPSpanExporter(url, timeout=EXPORT_S)
        self._failing = False
        self._told: list[str] = []
        """What OpenTelemetry would have logged of this batch."""
        for name in LIBRARY_LOGS:
            logging.getLogger(name).addFilter(self._keep)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._told = []
        result = self._exporter.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            reason = self._told[0] if self._told else "it did not say why"
            log.warning("the collector of traces does not take spans, so they are lost: %s", reason)
        elif self._failing and not failing:
            log.info("the collector of traces takes spans again")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        for name in LIBRARY_LOGS:
            logging.getLogger(name).removeFilter(self._keep)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _keep(self, record: logging.LogRecord) -> bool:
        """Keep a message of OpenTelemetry out of the log."""
        if len(self._told) < 10:
            self._told.append(record.getMessage())
        return False


class Traces:
    """Makes spans and sends them in a thread of its own. Must be made after a fork."""

    def __init__(self, endpoint: str, *, process: str, instance: str) -> None:
        """`endpoint`: base URL of a collector that takes OTLP over HTTP."""
        resource = Resource.create(
            {
                "service.name": f"modelservice-{process}",
                "service.version": VERSION,
                "service.instance.id": instance,
            }
        )
        # not at exit: a process that ends calls `stop`, which has a limit
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = _Exporter(endpoint.rstrip("/") + "/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("modelservice")

    def begin(
        self, name: str, traceparent: str | None, *, at_ns: int, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        """Begin a span below the one that `traceparent` names; with none, or one that is invalid, a new
        trace.

        `at_ns`: Unix time in nanoseconds.
        """
        parent = _propagator.extract({"traceparent": traceparent or ""})
        return self._tracer.start_span(name, parent, kind=kind, start_time=at_ns)

    def stop(self) -> None:
        """Send what is left, for at most STOP_S."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces-stop", daemon=True)
        thread.start()
        thread.join(STOP_S)
        if thread.is_alive():
            log.warning("the collector of traces did not answer within %g s; the last spans are lost", STOP_S)


def traceparent_of(span: Span) -> str:
    """Return what makes another span a child of this one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent", "")


def describe(span: Span, outcome: str, *, completed: bool, **attributes: Any) -> None:
    """Set attributes that are not None (`gen_ai__x` is gen_ai.x), and the status by the outcome."""
    for name, value in attributes.items():
        if value is not None:
            span.set_attribute(name.replace("__", "."), value)
    span.set_attribute("modelservice.outcome", outcome)
    if not completed:
        span.set_attribute("error.type", outcome)
        span.set_status(Status(StatusCode.ERROR))
