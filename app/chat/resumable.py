"""Chat streams that can be resumed: their chunks have numbers, and GET …/events continues after one of
them."""

import re

from flask import Blueprint, Response, request

from app.chat.response import ChatEventReader, ChunkEncoder, ChunkStream
from app.dispatch.resumption import Resumption
from app.http.connection import Connection
from app.http.wsgi import name_request
from app.respond import Chunks, stream_response
from catalogue import CHAT
from protocol.errors import InvalidRequest

EVENTS_PATH = f"{CHAT.path}/<request_id>/events"
_WANTED = "X-Resumable"
_LAST_ID = "Last-Event-ID"
_NUMBER = re.compile("[0-9]{1,9}")
_END = b"\n\n"


def is_wanted() -> bool:
    """Whether the current request asks for a stream that can be resumed."""
    return request.headers.get(_WANTED, "").lower() == "true"


class NumberedChunks:
    """Frames of a chat completion with their numbers, from 1 on, as ids. The first `skip` are left out."""

    __slots__ = ("_chunks", "_number", "_skip")

    def __init__(self, chunks: Chunks, skip: int = 0) -> None:
        self._chunks = chunks
        self._skip = skip
        self._number = 0

    def next_frames(self) -> bytes | None:
        """Return the frames of the next batch; b"" if there is none to send, None after the last."""
        frames = self._chunks.next_frames()
        if not frames:
            return frames
        numbered = []
        # a chunk is JSON on one line, so that no empty line is in it
        for frame in frames.split(_END)[:-1]:
            self._number += 1
            if self._number > self._skip:
                numbered.append(b"id: %d\n%s\n\n" % (self._number, frame))
        return b"".join(numbered)


def blueprint(resumption: Resumption) -> Blueprint:
    """Make the blueprint of the endpoint that continues streams."""
    routes = Blueprint("resumable", __name__)

    @routes.get(EVENTS_PATH)
    def resume_chat_completion(request_id: str) -> Response:
        after = _last_number()
        connection = Connection(request.environ)
        record, reader = resumption.resume(request_id, connection)
        # without `times`: those of the request are counted where it began
        name_request(request_id, record.model)
        try:
            encoder = ChunkEncoder(
                request_id,
                record.model,
                n=record.n,
                include_usage=record.include_usage,
                timings=reader.timings.milliseconds,
                created=record.created,
            )
            chunks = ChunkStream(ChatEventReader(reader, record.n), encoder)
            return stream_response(NumberedChunks(chunks, after), connection, reader.close)
        except BaseException:
            reader.close()
            raise

    return routes


def _last_number() -> int:
    """Return the number of the last chunk that the client has, 0 if it has none. Raises InvalidRequest."""
    given = request.headers.get(_LAST_ID, "")
    if given and not _NUMBER.fullmatch(given):
        raise InvalidRequest(f"{_LAST_ID} must be the id of a chunk of this stream", param=_LAST_ID)
    return int(given or 0)
