"""What a worker counts: its requests, images and GPU seconds, and what its engine counts."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.errors import WorkerLost
from protocol.leases import WorkerRecord
from protocol.metrics import GPU_SECONDS, RUNNING_GPU_SECONDS, MetricStore, Snapshot, families_of
from workers.engines.base import Engine
from workers.gpu_time import GpuTime
from workers.job_log import COMPLETED, JobLog

PROMPT_TOKENS = "Prompt tokens, those in the prefix cache included."


class WorkerMetrics:
    """The metrics of one worker.

    `ended` is called in the threads of the tasks, the others by the heartbeat.
    """

    def __init__(self, identity: WorkerRecord, engine: Engine, gpu_time: GpuTime, store: MetricStore) -> None:
        self._identity = identity
        self._gpu_time = gpu_time
        self._store = store
        self._resumed = False
        registry = self._registry = CollectorRegistry()
        self._success = Counter(
            "request_success_total",
            "Requests that were completed, by the reason why the answer ended. Without a text it is always stop.",
            ["finished_reason"],
            registry=registry,
        )
        self._failures = Counter(
            "request_failure_total",
            "Requests that were not completed, by the code of the error.",
            ["code"],
            registry=registry,
        )
        self._images = Counter("images_total", "Images that were sent.", registry=registry)
        self._steps = Counter(
            "image_steps_total", "Denoising steps, over all images of a request.", registry=registry
        )
        self._gpu_seconds = Counter(
            GPU_SECONDS,
            "Seconds in which the worker had requests, divided evenly among those that ran, by their outcome. "
            "Nobody received the answers of all outcomes but completed.",
            ["outcome"],
            registry=registry,
        )
        self._gpu_seconds.labels(COMPLETED)
        self._lost_gpu_seconds = self._gpu_seconds.labels(WorkerLost.code)
        # for engines that count no tokens themselves
        self._prompt_tokens = Counter("prompt_tokens_total", PROMPT_TOKENS, registry=None)
        registry.register(_EngineCollector(engine, gpu_time, self._prompt_tokens))

    def ended(self, job: JobLog) -> None:
        """Count a job that has ended."""
        if job.outcome == COMPLETED:
            self._success.labels(job.finish_reason or "stop").inc()
        else:
            self._failures.labels(job.outcome).inc()
        if job.usage is not None:
            self._prompt_tokens.inc(job.usage.prompt_tokens)
        self._images.inc(job.images)
        self._steps.inc(job.steps_done)
        self._gpu_seconds.labels(job.outcome).inc(job.gpu_s or 0.0)

    def publish(self) -> None:
        """Write the metrics for the web processes. Raises redis.RedisError."""
        cid = self._identity.cid
        if not self._resumed:
            self._resume(self._store.read(cid))
            self._resumed = True
        snapshot = Snapshot(
            labels={"model_name": self._identity.model, "cid": cid},
            families=families_of(self._registry),
            incarnation_id=self._identity.incarnation_id,
        )
        self._store.write(cid, snapshot)

    def write_off_running(self) -> None:
        """This worker counted as lost for a while: its running requests have failed."""
        self._lost_gpu_seconds.inc(self._gpu_time.write_off())

    def _resume(self, previous: Snapshot | None) -> None:
        """Go on from what an earlier incarnation lost; what it ran when it ended was lost as well.

        Web processes show that sum until here, so it must not begin at 0 again.
        """
        if previous is not None and previous.incarnation_id != self._identity.incarnation_id:
            lost = previous.value(GPU_SECONDS, outcome=WorkerLost.code)
            self._lost_gpu_seconds.inc(lost + previous.value(RUNNING_GPU_SECONDS))


class _EngineCollector(Collector):
    """What the engine has counted by itself, or `prompt_tokens` if it has not."""

    def __init__(self, engine: Engine, gpu_time: GpuTime, prompt_tokens: Counter) -> None:
        self._engine = engine
        self._gpu_time = gpu_time
        self._prompt_tokens = prompt_tokens

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            RUNNING_GPU_SECONDS, "GPU seconds of the requests that run now.", value=self._gpu_time.running_s()
        )
        counts = self._engine.status().counts
        if counts is None:
            yield from self._prompt_tokens.collect()
            return
        for name, text, value in (
            ("prompt_tokens", PROMPT_TOKENS, counts.prompt_tokens),
            ("generation_tokens", "Tokens that were generated.", counts.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens that were looked up.", counts.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens that the prefix cache had.", counts.prefix_hits),
            ("num_preemptions", "Running requests that were put back for lack of pages.", counts.preemptions),
        ):
            yield CounterMetricFamily(name, text, value=value)
        gaps = counts.token_gaps
        yield HistogramMetricFamily(
            "inter_token_latency_seconds",
            "Seconds between two tokens of a stream: of each decode step once for each of its rows.",
            buckets=gaps.buckets(),
            sum_value=gaps.seconds,
        )
