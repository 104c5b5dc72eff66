"""The spans of a job. Imported only where traces are wanted."""

import time

from opentelemetry.trace import SpanKind

from protocol.leases import WorkerRecord
from protocol.traces import Traces, describe
from workers.job_log import COMPLETED, JobLog


class JobTraces:
    """Makes the spans of a job when it has ended: `queue` until its claim, then one named by task and
    model."""

    def __init__(self, endpoint: str, identity: WorkerRecord) -> None:
        self._cid = identity.cid
        self._traces = Traces(endpoint, process="worker", instance=identity.incarnation_id)

    def trace(self, job: JobLog) -> None:
        """Make the spans of a job whose request has one."""
        if not job.traceparent:
            return
        ended_ns = time.time_ns()
        began_ns = ended_ns - int(job.seconds * 1e9)
        if job.queued_s is not None:
            queue = self._traces.begin("queue", job.traceparent, at_ns=began_ns - int(job.queued_s * 1e9))
            queue.end(began_ns)
        span = self._traces.begin(
            f"{job.task} {job.model}", job.traceparent, at_ns=began_ns, kind=SpanKind.CONSUMER
        )
        if job.first_token_after_s is not None:
            span.add_event("first_token", timestamp=began_ns + int(job.first_token_after_s * 1e9))
        usage = job.usage
        describe(
            span,
            job.outcome,
            completed=job.outcome == COMPLETED,
            gen_ai__request__model=job.model,
            gen_ai__usage__input_tokens=usage and usage.prompt_tokens,
            gen_ai__usage__output_tokens=usage and usage.completion_tokens,
            gen_ai__response__finish_reasons=job.finish_reasons or None,
            modelservice__request_id=job.request_id,
            modelservice__cid=self._cid,
            modelservice__images=job.images or None,
            modelservice__steps=job.steps_done or None,
            modelservice__gpu_s=job.gpu_s,
        )
        span.end(ended_ns)

    def stop(self) -> None:
        """Send the spans that are left."""
        self._traces.stop()
