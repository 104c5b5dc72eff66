"""Chooses the images of the next pipeline call: the oldest request goes first, compatible ones share its
call."""

from collections import deque
from typing import NamedTuple

from protocol.jobs import ImageJob
from workers.engines.images.request import Request


class BatchItem(NamedTuple):
    """One image of a request, as part of a call. `image_index` counts from 0."""

    request: Request
    image_index: int


class BatchQueue:
    """Requests with images that are not part of any call yet, oldest first. Not thread-safe."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._waiting: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def discard(self, job: ImageJob) -> None:
        """Remove the request of a job, if it is here."""
        self._waiting = deque(request for request in self._waiting if request.job is not job)

    def next_batch(self) -> list[BatchItem]:
        """Return what the next call can generate. Without waiting requests the list is empty."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        compatible = (request for request in self._waiting if request.shared == first.shared)
        items = [BatchItem(request, index) for request in compatible for index in request.pending]
        return items[: self._limit(first)]

    def is_full(self, batch: list[BatchItem]) -> bool:
        """Return whether more requests could not make the batch larger."""
        return len(batch) == self._limit(batch[0].request)

    def start(self, batch: list[BatchItem]) -> None:
        """Remove the images of a batch that is about to be generated."""
        for request, index in batch:
            request.pending.remove(index)
            if not request.pending:
                self._waiting.remove(request)

    def _limit(self, request: Request) -> int:
        return self._max_batch_size if request.pipeline.supports_batches else 1
