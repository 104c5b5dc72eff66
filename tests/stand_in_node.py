"""A stand-in for the network node that behaves as v0.2.3 of the real one does.

    python -m tests.stand_in_node --port 6000        # by hand: prints the calls it gets

In a test: `with StandInNode() as node:`; `node.stop()` and `node.start(forget=True)` take the node down and
up again, `node.behave("slow")` makes it slow. Its calling side is tests/stand_in_caller.py.
"""

import argparse
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, get_args

from tests.deployment import free_port
from tests.node_book import PEER_ID, Mode, NodeBook
from tests.stand_in_caller import Answer, NodeCaller, Stream


@dataclass(frozen=True)
class Call:
    """One request to the node. `at`: time.monotonic() of its arrival; `status` 0: never answered."""

    at: float
    method: str
    path: str
    body: Any
    status: int
    answer: Any

    @property
    def name(self) -> str:
        """Path without the common beginning, "model/register" for example."""
        return self.path.removeprefix("/api/v0/").removeprefix("ai/")


class StandInNode:
    """The node. Registrations survive `stop` and `start`, as the real one's do."""

    def __init__(self, port: int | None = None, *, verbose: bool = False) -> None:
        self.port = port or free_port()
        self.calls: list[Call] = []
        self.book = NodeBook()
        self.caller = NodeCaller()
        self.delay_s = 10.0
        self._in_flight: dict[tuple[str, str, str], int] = {}
        self._changed = threading.Condition()
        self._verbose = verbose
        self._server: _Server | None = None

    def start(self, *, forget: bool = False) -> Self:
        """Listen, on the same port as before. `forget`: without the registrations from before."""
        if forget:
            self.book.projects = {}
        self._server = _Server(("127.0.0.1", self.port), self)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="node", daemon=True).start()
        return self

    def stop(self) -> None:
        """Go down: connections break, new ones are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def behave(self, mode: Mode, *, delay_s: float = 10.0, code: int = 1001) -> None:
        """Behave differently from now on.

        `slow`: every call is handled after `delay_s`. `refusing`: registering and unregistering fail with
        `code`. `old`: there are no calls for single models, as before v0.2.1. `unlisted`: the node's own
        list can't be read.
        """
        self.delay_s, self.book.mode, self.book.code = delay_s, mode, code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.caller.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entries(self, project: str | None = None) -> list[dict[str, Any]]:
        """All registrations as {project, model, api, type, cid}, in the node's order."""
        with self._changed:
            return [
                {"project": name, **entry}
                for name, entries in self.book.projects.items()
                for entry in entries
                if project in (None, name)
            ]

    def cids(self, project: str | None = None) -> list[str]:
        return [entry["cid"] for entry in self.entries(project)]

    def seen(self, *names: str) -> list[Call]:
        """The calls of these names ("model/register", …) in order; without names, all."""
        with self._changed:
            return [call for call in self.calls if not names or call.name in names]

    def wait_for(self, predicate: Callable[["StandInNode"], object], timeout_s: float = 10.0) -> None:
        """Wait until `predicate(node)` holds, which is evaluated after each call. Raises AssertionError."""
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout_s):
                told = "\n".join(
                    f"  {call.at:.2f} {call.name} {call.body} -> {call.answer}" for call in self.calls
                )
                raise AssertionError(
                    f"not so within {timeout_s} s; the node was called:\n{told or '  never'}"
                )

    def add(self, project: str, model: str, api: str, kind: int = 0, cid: str = "") -> None:
        """Put an entry on the list, as if somebody else had registered it."""
        with self._changed:
            entry = {"model": model, "api": api, "type": kind, "cid": cid}
            self.book.projects.setdefault(project, []).append(entry)

    # ----- its calling side: requests of users

    @contextmanager
    def picked(self, project: str, model: str, cid: str = "") -> Iterator[str]:
        """The `api` that a request goes to: fewest in flight first, then first registered."""
        with self._changed:
            fitting = [
                entry
                for entry in self.book.projects.get(project, [])
                if entry["model"] == model and cid in ("", entry["cid"])
            ]
            if not fitting:
                raise AssertionError(f"the node knows no {model!r} in {project!r}; it has {self.entries()}")
            keys = [(project, model, entry["cid"]) for entry in fitting]
            key = min(keys, key=lambda key: self._in_flight.get(key, 0))
            self._in_flight[key] = self._in_flight.get(key, 0) + 1
        try:
            yield fitting[keys.index(key)]["api"]
        finally:
            with self._changed:
                self._in_flight[key] -= 1

    def call_chat(self, project: str, model: str, messages: Any, *, cid: str = "", **fields: Any) -> Answer:
        with self.picked(project, model, cid) as api:
            return self.caller.call_chat(api, model, messages, **fields)

    def call_stream(
        self, project: str, model: str, messages: Any, *, cid: str = "", **fields: Any
    ) -> Stream | Answer:
        with self.picked(project, model, cid) as api:
            return self.caller.call_stream(api, model, messages, **fields)

    def call_image(self, project: str, model: str, prompt: str, *, cid: str = "", **fields: Any) -> Answer:
        with self.picked(project, model, cid) as api:
            return self.caller.call_image(api, model, prompt, **fields)

    def call_edit(
        self,
        project: str,
        model: str,
        image: bytes,
        *,
        cid: str = "",
        mask: bytes | None = None,
        **fields: Any,
    ) -> Answer:
        with self.picked(project, model, cid) as api:
            fields = {"node_id": PEER_ID, "project": project, "cid": cid, "model": model, **fields}
            return self.caller.call_edit(api, image, mask=mask, **fields)

    # ----- calls to it

    def answer(self, method: str, path: str, raw: bytes) -> tuple[int, Any]:
        with self._changed:
            return self.book.answer(method, path, raw)

    def note(self, call: Call) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        if self._verbose:
            print(
                f"{call.method} {call.path} {json.dumps(call.body)} -> {call.status} {json.dumps(call.answer)}",
                flush=True,
            )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], node: StandInNode) -> None:
        super().__init__(address, _Handler)
        self.node = node
        self.closing = threading.Event()
        self.open: set[socket.socket] = set()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it closed by itself meanwhile

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: clients that disconnect are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        node, arrived = self.server.node, time.monotonic()
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if node.book.mode == "slow" and self.server.closing.wait(node.delay_s):
            self.close_connection = True
            return
        status, answer = node.answer(self.command, self.path, raw)
        try:
            told = json.loads(raw) if raw else None
        except ValueError:
            told = raw.decode(errors="replace")
        # noted before it is answered: a test that has the answer must find the call in the list
        node.note(Call(arrived, self.command, self.path, told, status, answer))
        self._send(status, answer)

    do_GET = do_POST

    def _send(self, status: int, answer: Any) -> None:
        kind = "text/plain" if isinstance(answer, str) else "application/json; charset=utf-8"
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent: `note` reports calls."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A stand-in for the network node that prints the calls it gets."
    )
    parser.add_argument("--port", type=int, default=6000)
    parser.add_argument("--mode", choices=get_args(Mode), default="ok")
    options = parser.parse_args()
    with StandInNode(options.port, verbose=True) as node:
        node.behave(options.mode)
        print(f"stand-in node at {node.url}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stand-in node ends", flush=True)


if __name__ == "__main__":
    main()
