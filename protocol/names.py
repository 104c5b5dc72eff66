"""The names of our keys and channels in Redis. All begin with the deployment's namespace.

Celery's own keys get the same prefix, and so do the counters of app/http/rate_limit.py.
"""

import hashlib
from typing import NamedTuple

GENERATE_TASK = "generate"
"""The one Celery task. Its only argument is the request id: no prompt is in a queue, a log or Flower."""


class Keys(NamedTuple):
    """Names of keys and channels. `prefix` is `<namespace>:`; Celery's `global_keyprefix` is the same."""

    prefix: str

    @classmethod
    def of(cls, namespace: str) -> "Keys":
        return cls(f"{namespace}:")

    def job(self, request_id: str) -> str:
        """Hash with a TTL: the job's JSON, its files, its web process and its times."""
        return f"{self.prefix}job:{request_id}"

    def claim(self, request_id: str) -> str:
        """String: incarnation id of the worker that has the request. TTL above every deadline."""
        return f"{self.prefix}claim:{request_id}"

    def cancel(self, request_id: str) -> str:
        """String: exists when the request was cancelled; its value tells whether by an operator."""
        return f"{self.prefix}cancel:{request_id}"

    def replay(self, request_id: str) -> str:
        """List: the request's envelopes in order; a repeated write leaves duplicates."""
        return f"{self.prefix}events:{request_id}"

    def stream(self, request_id: str) -> str:
        """Hash with a TTL: a stream that its client may resume (protocol/resumable_streams.py)."""
        return f"{self.prefix}stream:{request_id}"

    def channel(self, web_id: str) -> str:
        """Pub/sub channel of one web process: the envelopes of all its requests."""
        return f"{self.prefix}out:{web_id}"

    def image(self, name: str) -> str:
        """String with a TTL: the PNG bytes of a generated image. Names have no `#`."""
        return f"{self.prefix}image:{name}"

    @property
    def image_expiry(self) -> str:
        """Sorted set: names of images, scored by expiry (Redis time, microseconds)."""
        return self.image("#expiry")

    @property
    def image_sizes(self) -> str:
        """Hash: bytes of each image by name, and their sum as `total`."""
        return self.image("#sizes")

    def web_lease(self, web_id: str) -> str:
        """String with a TTL: the lease of a web process."""
        return f"{self.prefix}web:{web_id}"

    def queue(self, model: str) -> str:
        """Celery queue of a model, without the prefix: Celery adds `global_keyprefix` itself."""
        return f"model.{model}"

    def queue_list(self, model: str) -> str:
        """The Redis list behind `queue`."""
        return f"{self.prefix}{self.queue(model)}"

    def waiting(self, model: str) -> str:
        """Sorted set: ids of admitted, unclaimed requests, scored by deadline (Redis time, seconds)."""
        return f"{self.prefix}waiting:{model}"

    def running(self, model: str) -> str:
        """Sorted set: ids of claimed requests that have not ended, scored by deadline.

        Those of a lost worker stay.
        """
        return f"{self.prefix}running:{model}"

    def youngest_claimed(self, model: str) -> str:
        """String: admission time of the youngest request that a worker has claimed."""
        return f"{self.prefix}youngest:{model}"

    @property
    def ended_requests(self) -> str:
        """Stream: the last requests that ended, of all web processes (app/dispatch/activity.py)."""
        return f"{self.prefix}ended"

    def sample(self, at: int | str) -> str:
        """Hash with a TTL: queues and times to first token in some seconds from `at` on (Redis time)."""
        return f"{self.prefix}sample:{at}"

    @property
    def alarms(self) -> str:
        """Sorted set: texts of the supervisors' alarms, scored by expiry (Redis time, seconds)."""
        return f"{self.prefix}alarms"

    @property
    def metrics(self) -> str:
        """Set with a TTL: the processes (web ids and cids) that have metrics."""
        return f"{self.prefix}metrics"

    def metrics_of(self, process: str) -> str:
        """String with a TTL: a process's metrics as JSON. It outlives the process."""
        return f"{self.metrics}:{process}"

    @property
    def drains(self) -> str:
        """Set: Celery's names of the workers under drain.

        It has no TTL: they are drained until they are resumed.
        """
        return f"{self.prefix}drains"

    @property
    def workers(self) -> str:
        """Set: cids of the workers that have a record."""
        return f"{self.prefix}workers"

    def worker(self, cid: str) -> str:
        """String: the worker's WorkerRecord as JSON. It outlives the lease, so that a lost worker shows."""
        return f"{self.prefix}worker:{cid}"

    def lease(self, cid: str) -> str:
        """String with a TTL: the lease of a worker. Its value is the incarnation id."""
        return f"{self.prefix}lease:{cid}"

    def node_lock(self, node_url: str, service_id: str) -> str:
        """Lock: one call to a node at a time."""
        return f"{self.prefix}node:{_short_hash(service_id, node_url)}"

    def reconciler(self, node_url: str, service_id: str) -> str:
        """String with a TTL: the lease of the process that reconciles a node."""
        return f"{self.prefix}reconciler:{_short_hash(service_id, node_url)}"


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
