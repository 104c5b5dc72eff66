"""Cancels the requests of this worker for which nobody waits any more."""

import time
from collections.abc import Callable

from protocol.leases import Leases, Observation
from protocol.queue import JobQueue
from workers.runner import Runner
from workers.stream_readers import StreamReaders


class AbandonedRequests:
    """Finds them by their cancel marks, by the leases of web processes, and by the readers of resumable
    streams.

    Methods raise redis.RedisError.
    """

    def __init__(
        self,
        queue: JobQueue,
        leases: Leases,
        readers: StreamReaders,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._leases = leases
        self._readers = readers
        self._runner = runner
        self._observation = Observation(clock)

    def cancel(self) -> None:
        """Cancel the requests that a web process or an operator has marked, and the streams that nobody
        resumed."""
        self._readers.follow()
        for request_id in self._queue.cancelled(self._runner.running()):
            self._runner.cancel(request_id)

    def cancel_for_lost_webs(self) -> None:
        """Cancel the requests of web processes whose lease has expired: nobody reads their events any more.

        A missing lease counts only after leases have been watched for long enough (`Observation`).
        """
        web_ids = self._runner.web_ids()
        living = self._leases.living_webs(sorted(web_ids))
        self._observation.seen()
        if self._observation.absence_counts():
            lost = web_ids - living
            self._readers.leave_lost(lost)
            self._runner.set_lost_webs(lost)

    def interrupt(self) -> None:
        """Watch leases from the beginning: a look has failed."""
        self._observation.interrupt()
