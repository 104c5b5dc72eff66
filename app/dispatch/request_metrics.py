"""What this process counts of requests: times until their answers, and refusals. The names are vLLM's."""

from prometheus_client import CollectorRegistry, Counter, Histogram

QUEUE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)
FIRST_TOKEN_BUCKETS = (
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 300)


class ModelTimes:
    """The histograms of one model, in seconds."""

    __slots__ = ("decode", "first_token", "prefill", "queue", "request")

    def __init__(
        self,
        queue: Histogram,
        prefill: Histogram,
        first_token: Histogram,
        decode: Histogram,
        request: Histogram,
    ) -> None:
        self.queue = queue
        self.prefill = prefill
        self.first_token = first_token
        self.decode = decode
        self.request = request


class RequestMetrics:
    """Makes the metrics in `registry`. `model` is always a name of the catalogue."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=registry)

        self._queue = histogram(
            "request_queue_time_seconds",
            "Seconds from a request's admission until a worker had claimed it.",
            QUEUE_BUCKETS,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "Seconds from the claim of a chat by a worker to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "Seconds from a chat's admission to its first token, as the web process saw it: time in the queue included.",
            FIRST_TOKEN_BUCKETS,
        )
        self._decode = histogram(
            "request_decode_time_seconds",
            "Seconds from the first token of a complete chat to its end.",
            REQUEST_BUCKETS,
        )
        self._request = histogram(
            "e2e_request_latency_seconds",
            "Seconds from a request's admission to the end of its complete answer.",
            REQUEST_BUCKETS,
        )
        self._rejections = Counter(
            "admission_rejections_total",
            "Requests for a model that were refused before they were queued, by the code of the error.",
            ["model_name", "code"],
            registry=registry,
        )

    def times_of(self, model: str) -> ModelTimes:
        """Return the histograms of a model."""
        return ModelTimes(
            self._queue.labels(model),
            self._prefill.labels(model),
            self._first_token.labels(model),
            self._decode.labels(model),
            self._request.labels(model),
        )

    def rejected(self, model: str, code: str) -> None:
        """Count a refusal. `code`: that of a class of protocol.errors."""
        self._rejections.labels(model, code).inc()
