"""A client for streams that uses little CPU time: raw sockets and one selector.

Client and server share the machine, so the client's time would count against the server.
"""

import json
import selectors
import socket
import time
from dataclasses import dataclass, field

TOKEN = b'"delta":{"content":"'
DONE = b"data: [DONE]"


@dataclass
class StreamResult:
    """The times of one stream, in monotonic seconds. `gaps_s` are the times between arrivals of tokens."""

    sent_at: float
    first_token_at: float = 0.0
    ended_at: float = 0.0
    tokens: int = 0
    done: bool = False
    gaps_s: list[float] = field(default_factory=list)


class _Open:
    def __init__(self, sock: socket.socket, sent_at: float) -> None:
        self.sock = sock
        self.result = StreamResult(sent_at)
        self.tail = b""
        self.last_at = 0.0


def chat_request(host: str, body: dict[str, object]) -> bytes:
    """Return the bytes of a request for a streamed chat. `stream` is added to `body`."""
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def run_streams(
    port: int, requests: list[bytes], timeout_s: float = 300, results: list[StreamResult] | None = None
) -> list[StreamResult]:
    """Send all requests at once and read every stream to its end.

    A list given as `results` is filled while the streams run, so that another thread can watch it.
    """
    results = [] if results is None else results
    selector = selectors.DefaultSelector()
    for request in requests:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = _Open(sock, time.monotonic())
        sock.sendall(request)
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, stream)
        results.append(stream.result)
    give_up_at = time.monotonic() + timeout_s
    while selector.get_map() and time.monotonic() < give_up_at:
        for key, _ in selector.select(1.0):
            if not _read(key.data):
                selector.unregister(key.data.sock)
                key.data.sock.close()
    return results


def _read(stream: _Open) -> bool:
    """Read what has arrived. Returns False at the end of the stream."""
    data = stream.sock.recv(262144)
    now = time.monotonic()
    result = stream.result
    if not data:
        result.ended_at = now
        return False
    window = stream.tail + data
    tokens = _count(window) - _count(stream.tail)
    if tokens:
        result.first_token_at = result.first_token_at or now
        if stream.last_at:
            result.gaps_s.append(now - stream.last_at)
        stream.last_at = now
        result.tokens += tokens
    result.done = result.done or DONE in window
    stream.tail = window[-len(TOKEN) :]
    return True


def _count(data: bytes) -> int:
    """Return the number of deltas with text; the last chunk of a stream has an empty one."""
    return data.count(TOKEN) - data.count(TOKEN + b'"')


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of `values` lie, 0.0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
