"""Follows the readers of the streams that can be resumed, and cancels those that nobody has resumed."""

from protocol.event_sender import EventSender
from protocol.resumable_streams import ResumableStreams, web_of
from workers.runner import Runner


class StreamReaders:
    """One for each worker process. Methods raise redis.RedisError."""

    def __init__(self, streams: ResumableStreams, runner: Runner, sender: EventSender) -> None:
        self._streams = streams
        self._runner = runner
        self._sender = sender

    def follow(self) -> None:
        """Send the events of each stream to its reader's web process, and cancel those whose grace period is
        over.

        Without such streams nothing is asked.
        """
        before = self._runner.readers()
        if not before:
            return
        for request_id, reader in zip(before, self._streams.readers(list(before)), strict=True):
            if reader is not None and reader != before[request_id]:
                self._runner.set_reader(request_id, reader)
                self._sender.redirect(request_id, web_of(reader))
            elif reader is None and before[request_id] is not None:
                # before the first token there is no record, and the end of the client cancels the request
                self._runner.cancel(request_id)

    def leave_lost(self, web_ids: set[str]) -> None:
        """Begin the grace period of the streams whose web process is lost, and which can't do it itself."""
        for request_id, reader in self._runner.readers().items():
            if reader and web_of(reader) in web_ids:
                self._streams.leave(request_id, reader, finished=False)
