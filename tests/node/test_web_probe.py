"""node.web_watch.http_probe against a real web process, and against everything else that may listen there."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from werkzeug.serving import BaseWSGIServer, make_server

from app import create_app
from catalogue import Catalogue
from config import Settings
from node.web_watch import http_probe

CATALOGUE = Catalogue.model_validate(
    {"project": "P", "models": [{"name": "Chat +1", "tasks": ["chat"], "weights": "echo:"}]}
)


@pytest.fixture
def web() -> Iterator[str]:
    """The URL of a web process of namespace `P`, which never needs Redis to answer the probe."""
    server = make_server("127.0.0.1", 0, create_app(Settings(namespace="P", node_url=""), CATALOGUE))
    with served(server):
        yield f"http://127.0.0.1:{server.server_port}"


class served:
    """Serves while the block runs."""

    def __init__(self, server: BaseWSGIServer | ThreadingHTTPServer) -> None:
        self.server = server

    def __enter__(self) -> None:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_our_web_process_passes(web: str) -> None:
    assert http_probe(web, "P", "Chat +1")() == ""


@pytest.mark.parametrize(
    ("namespace", "model"), [("Q", "Chat +1"), ("P", "Draw"), ("", ""), ("P&model=Chat", "x")]
)
def test_a_web_process_of_another_deployment_does_not(web: str, namespace: str, model: str) -> None:
    reason = http_probe(web, namespace, model)()

    assert reason == (
        f"SERVICE_URL {web} is not answered by a web process of namespace {namespace!r} that serves {model!r} "
        "(HTTP 200)"
    )


@pytest.fixture
def stranger() -> Iterator[Callable[[int, bytes], str]]:
    """Starts a server that gives one answer to everything, and returns its URL."""
    running = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        serving = served(server)
        serving.__enter__()
        running.append(serving)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for serving in running:
        serving.__exit__()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"404 page not found"),
        (200, b""),
        (200, b"OK"),
        (200, b'{"code": 0, "message": "ok"}'),
        (200, b'["serves"]'),
        (200, b'{"serves": "true"}'),
        (200, b"\xff" * 5000),
        (302, b'{"serves": true}'),
        (502, b'{"serves": true}'),
    ],
)
def test_a_stranger_does_not(stranger: Callable[[int, bytes], str], status: int, body: bytes) -> None:
    url = stranger(status, body)

    assert f"SERVICE_URL {url} is not answered by a web process" in http_probe(url, "P", "Chat")()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url", "http://[::1"])
def test_what_does_not_answer_is_named(url: str) -> None:
    assert http_probe(url, "P", "Chat")() == f"SERVICE_URL {url} does not answer"
