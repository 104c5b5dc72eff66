"""Calls a model as the node does and interprets the response as the node does (docs/node.md).

Requests are byte for byte those of the node. A body is JSON only under exactly `application/json`; then
`code` alone decides, not the HTTP status, and one field of a wrong type makes the whole response invalid. A
response that the node would not pass on correctly raises AssertionError.
"""

import http.client
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.go_json import GoDecodeError, Spec, decode

CHAT_LIMIT_S, IMAGE_LIMIT_S, EDIT_LIMIT_S = 180.0, 300.0, 180.0
RELAY_LIMIT_BYTES = 2**20

CHAT: Spec = {
    "code": int,
    "message": str,
    "id": str,
    "object": str,
    "created": int,
    "choices": [{"index": int, "message": {"role": str, "content": str}, "finish_reason": str}],
    "usage": {"completion_tokens": int, "prompt_tokens": int, "total_tokens": int},
}
IMAGE: Spec = {
    "code": int,
    "message": str,
    "created": int,
    "data": [{"b64_json": str, "url": str, "revised_prompt": str}],
}


@dataclass(frozen=True)
class Answer:
    """A response: `body` as it was sent; `seen`: the fields that the node decodes, zero where missing."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]
    seen: dict[str, Any]

    @property
    def code(self) -> int:
        return int(self.seen["code"])

    @property
    def message(self) -> str:
        return str(self.seen["message"])

    @property
    def text(self) -> str:
        """The content of a chat's first choice."""
        return str(self.seen["choices"][0]["message"]["content"])


@dataclass
class Stream:
    """A streamed response, which the node passes on unread. `done`: `[DONE]` came last."""

    status: int
    headers: dict[str, str]
    chunks: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def text(self) -> str:
        deltas = [choice.get("delta", {}) for chunk in self.chunks for choice in chunk.get("choices", [])]
        return "".join(delta.get("content") or "" for delta in deltas)


class NodeCaller:
    """The node's HTTP client: it reuses idle connections and never repeats a POST. Safe for many threads."""

    def __init__(self) -> None:
        self._idle: dict[str, list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def call_chat(self, api: str, model: str, messages: Any, **fields: Any) -> Answer:
        """Send a plain chat. `fields`: temperature, top_p, wallet, signature, hash, and no others."""
        response, raw = self._post_whole(api, _chat_body(model, messages, False, fields), CHAT_LIMIT_S)
        return _decoded(response, raw, CHAT, needs="choices")

    def call_stream(self, api: str, model: str, messages: Any, **fields: Any) -> Stream | Answer:
        """Send a streamed chat and read it to its end. An Answer is an error in plain JSON."""
        opened = self.open_stream(api, model, messages, **fields)
        if isinstance(opened, Answer):
            return opened
        stream, chunks = opened
        for _ in chunks:
            pass
        return stream

    def open_stream(
        self, api: str, model: str, messages: Any, **fields: Any
    ) -> Answer | tuple[Stream, Iterator[dict[str, Any]]]:
        """Send a streamed chat; the iterator of chunks ends after `[DONE]` or when the connection breaks."""
        deadline = time.monotonic() + CHAT_LIMIT_S
        connection, response = self._post(api, _chat_body(model, messages, True, fields), CHAT_LIMIT_S)
        if response.getheader("Content-Type") == "application/json":
            answer = _decoded(response, response.read(), CHAT, needs=None)
            self._keep(api, connection, response)
            assert answer.code != 0, "JSON with code 0 to a streamed request: the user gets an empty body"
            return answer
        stream = Stream(response.status, dict(response.getheaders()))
        return stream, self._read_stream(api, connection, response, stream, deadline)

    def _read_stream(
        self,
        api: str,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        stream: Stream,
        deadline: float,
    ) -> Iterator[dict[str, Any]]:
        try:
            while line := response.readline():
                assert time.monotonic() < deadline, f"the node cuts a stream after {CHAT_LIMIT_S:.0f} s"
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                assert not stream.done, f"something follows [DONE]: {payload!r}"
                if payload == b"[DONE]":
                    stream.done = True
                    continue
                stream.arrived.append(time.monotonic())
                stream.chunks.append(decode(payload, object))
                yield stream.chunks[-1]
        except (http.client.HTTPException, OSError):
            # To the node this looks like a complete stream: only [DONE] shows the difference.
            connection.close()
            return
        self._keep(api, connection, response)

    def call_image(self, api: str, model: str, prompt: str, **fields: Any) -> Answer:
        """Send a generation. Of `fields` (n, size, width, …) omitted ones are sent as 0 or ""."""
        body = {"model": model, "prompt": prompt, "n": 0, "size": "", "width": 0, "height": 0}
        body |= {name: fields.pop(name) for name in ("n", "size", "width", "height") if name in fields}
        if step := fields.pop("step", 0):
            body["step"] = step
        body["response_format"] = fields.pop("response_format", "")
        body |= _wallet(fields)
        response, raw = self._post_whole(api, body, IMAGE_LIMIT_S)
        relayed = body["response_format"] == "b64_json" or len(raw) <= RELAY_LIMIT_BYTES
        assert relayed, f"a response of {len(raw)} bytes is lost between nodes"
        return _decoded(response, raw, IMAGE, needs="data")

    def call_edit(
        self,
        api: str,
        image: bytes | None,
        *,
        mask: bytes | None = None,
        filename: str = "image.png",
        **fields: Any,
    ) -> Answer:
        """Send an edit: the files first, as octet-stream, then `fields` as form fields in the given order."""
        boundary = secrets.token_hex(30)
        parts = []
        for name, data in (("image", image), ("mask", mask)):
            if data is not None:
                disposition = f'form-data; name="{name}"; filename="{filename}"'
                parts.append((disposition, "Content-Type: application/octet-stream\r\n", data))
        for name, value in fields.items():
            parts.append((f'form-data; name="{name}"', "", str(value).encode()))
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: {disposition}\r\n{kind}\r\n".encode() + data + b"\r\n"
            for disposition, kind, data in parts
        )
        body += f"--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        connection, response = self._post(api, body, EDIT_LIMIT_S, kind)
        raw = response.read()
        self._keep(api, connection, response)
        return _decoded(response, raw, IMAGE, needs="data")

    # ----- connections

    def _post_whole(
        self, api: str, body: dict[str, Any], limit_s: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        started = time.monotonic()
        connection, response = self._post(api, body, limit_s)
        raw = response.read()
        assert time.monotonic() - started < limit_s, f"the node gives up after {limit_s:.0f} s"
        self._keep(api, connection, response)
        return response, raw

    def _post(
        self, api: str, body: dict[str, Any] | bytes, limit_s: float, kind: str = "application/json"
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(api)
        with self._lock:
            idle = self._idle.setdefault(parts.netloc, [])
            connection = idle.pop() if idle else None
        reused = connection is not None
        connection = connection or http.client.HTTPConnection(parts.netloc)
        connection.timeout = limit_s
        if connection.sock is not None:
            connection.sock.settimeout(limit_s)
        data = body if isinstance(body, bytes) else _encode(body)
        headers = {"User-Agent": "Go-http-client/1.1", "Content-Type": kind, "Accept-Encoding": "gzip"}
        try:
            connection.request("POST", parts.path, data, headers)
            return connection, connection.getresponse()
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            idle_note = " over a connection that had been idle" if reused else ""
            raise AssertionError(
                f"POST {api}{idle_note} failed: {error!r}; the node does not try again"
            ) from error

    def _keep(
        self, api: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        if response.will_close or not response.isclosed():
            connection.close()
            return
        with self._lock:
            self._idle.setdefault(urlsplit(api).netloc, []).append(connection)


def _chat_body(model: str, messages: Any, stream: bool, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the node's body of a chat: `messages` may be null, temperature and top_p are left out if 0."""
    body = {"model": model, "messages": messages, "stream": stream}
    fields = dict(fields)
    body |= {name: value for name in ("temperature", "top_p") if (value := fields.pop(name, 0))}
    return body | _wallet(fields)


def _wallet(fields: dict[str, Any]) -> dict[str, Any]:
    unknown = set(fields) - {"wallet", "signature", "hash"}
    assert not unknown, f"the node never passes {sorted(unknown)} on"
    return {name: fields[name] for name in ("wallet", "signature", "hash") if fields.get(name)}


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def _decoded(response: http.client.HTTPResponse, raw: bytes, spec: Spec, needs: str | None) -> Answer:
    """Return the response as the node decodes it. Raises AssertionError where the node would fail."""
    kind = response.getheader("Content-Type")
    assert kind == "application/json", (
        f"HTTP {response.status} with Content-Type {kind!r}: not JSON to the node"
    )
    try:
        seen = decode(raw, spec)
        body = decode(raw, object)
    except GoDecodeError as error:
        raise AssertionError(f"the node can't read the answer: {error}; it was {raw[:300]!r}") from error
    answer = Answer(response.status, dict(response.getheaders()), body, seen)
    if answer.code == 0 and needs:
        assert seen[needs], f"code 0 without {needs}: an empty success to the user (HTTP {response.status})"
    if answer.code != 0:
        assert answer.message, "an error without a message"
    return answer
