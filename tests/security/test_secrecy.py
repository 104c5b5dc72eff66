"""Prompts, images and keys do not show in logs, Flower, Celery's messages and events, Redis or process lists.

Markers are sent in every kind of request to real processes; then everything that was written anywhere is
searched for them. In Redis they may occur only in keys with a TTL.
"""

import base64
import io
import json
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from flask import Flask
from PIL import Image, PngImagePlugin

from app.http.errors import register_error_handlers
from catalogue import Catalogue
from config import Settings
from protocol.celery_app import create_celery
from protocol.connections import namespace_of
from protocol.names import Keys
from tests.deployment import ROOT, Deployment, free_port, wait_until
from tests.security.conftest import Answer, GuardedRedis, KeyedDeployment, ask

PROMPT = "prompt" + secrets.token_hex(12)
IMAGE = "image" + secrets.token_hex(12)
KEY = "sk-key" + secrets.token_hex(12)
WRONG_KEY = "sk-wrong" + secrets.token_hex(12)
REDIS_PASSWORD = "redis" + secrets.token_hex(12)
MARKERS = [PROMPT, IMAGE, KEY, WRONG_KEY, REDIS_PASSWORD]

DEMO = ROOT / "demo" / "models" / "chat"
MODELS = ["echo", "echo-images"]
CATALOGUE = """
project = "Test"
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:step_ms=20&tokens=100000"
[models.engine]
max_batch_size = 1
[[models]]
name = "echo-images"
tasks = ["generation", "edit"]
weights = "echo:step_ms=5"
"""
if DEMO.is_dir():
    MODELS.append("demo-chat")
    CATALOGUE += f"""
[[models]]
name = "demo-chat"
tasks = ["chat"]
weights = "{DEMO}"
[models.engine]
torch_threads = 1
"""


def forms(marker: str) -> list[bytes]:
    """Return a marker as it may be written: plain, in hex, and in base64 at each of the three alignments."""
    plain = marker.encode()
    found = [plain, plain.hex().encode()]
    for skip in range(3):
        encoded = base64.b64encode(b"\0" * skip + plain)
        # Without the characters that depend on the neighbouring bytes.
        found.append(encoded[4 if skip else 0 : -4])
    return found


def markers_in(data: bytes) -> list[str]:
    return [marker for marker in MARKERS if any(form in data for form in forms(marker))]


def check_clean(data: bytes, where: str) -> None:
    assert not markers_in(data), f"{where} contains {markers_in(data)}"


def dump(client: Any) -> dict[bytes, tuple[int, bytes]]:
    """Return all of Redis: name to time to live (ms; -1 for none) and content."""
    found = {}
    for name in client.scan_iter("*", count=1000):
        ttl = client.pttl(name)
        match client.type(name):
            case b"string":
                parts = [client.get(name)]
            case b"hash":
                parts = [part for pair in client.hgetall(name).items() for part in pair]
            case b"list":
                parts = client.lrange(name, 0, -1)
            case b"set":
                parts = list(client.smembers(name))
            case b"zset":
                parts = client.zrange(name, 0, -1)
            case b"stream":
                fields = [fields for _, fields in client.xrange(name)]
                parts = [part for entry in fields for pair in entry.items() for part in pair]
            case b"none":
                continue  # expired meanwhile
            case kind:
                raise AssertionError(f"{name!r} is of type {kind!r}, which this test can't read")
        found[name] = (ttl, b"\n".join(part for part in parts if part is not None))
    return found


def check_dump(found: dict[bytes, tuple[int, bytes]]) -> list[str]:
    """Check that markers occur only under a TTL and keys not at all; return the markers found."""
    everything = []
    for name, (ttl, content) in found.items():
        check_clean(name, "the name of a key in Redis")
        here = markers_in(content)
        assert not here or ttl > 0, f"{name!r} contains {here} and has no TTL"
        assert KEY not in here and WRONG_KEY not in here and REDIS_PASSWORD not in here, name
        everything += here
    return everything


class Events:
    """Receives Celery's events and asks workers for their state, as Flower does."""

    def __init__(self, service: Deployment) -> None:
        settings = Settings(redis_url=service.redis.url, node_url="")
        keys = Keys.of(namespace_of(settings, Catalogue.from_file(service.catalogue)))
        self.app: Celery = create_celery(settings, keys)
        self.seen: list[dict[str, Any]] = []
        self._connection = self.app.connection()
        self._receiver = self.app.events.Receiver(self._connection, handlers={"*": self.seen.append})
        self._thread = threading.Thread(target=self._capture, daemon=True)

    def __enter__(self) -> "Events":
        self._thread.start()
        self.app.control.enable_events()
        wait_until(
            lambda: self.types() & {"worker-heartbeat", "worker-online"}, timeout_s=30, what="events come"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the thread must end before its Redis"

    def types(self) -> set[str]:
        return {event["type"] for event in self.seen}

    def _capture(self) -> None:
        with self._connection:
            self._receiver.capture(limit=None, timeout=None, wakeup=False)

    def asked(self) -> bytes:
        inspect = self.app.control.inspect(timeout=10, limit=len(MODELS))
        answers = [inspect.active(), inspect.reserved(), inspect.stats(), inspect.conf(), inspect.report()]
        assert any(answers), "no worker answered"
        return repr(answers).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedDeployment]:
    folder: Path = tmp_path_factory.mktemp("secrecy")
    server = GuardedRedis(
        folder / "redis",
        "user default off",
        f"user service on >{REDIS_PASSWORD} ~* &* +@all",
        user="service",
        password=REDIS_PASSWORD,
    )
    service = KeyedDeployment(
        folder,
        catalogue=CATALOGUE,
        redis_server=server,
        API_KEYS=f"other, {KEY}",
        RATE_LIMIT="10000/minute",
        NODE_BIND=f"127.0.0.1:{free_port()}",
    )
    service.key = KEY
    with service:
        try:
            server.start()
            service.start_web()
            for model in MODELS:
                service.start_worker(model)
            service.wait_ready(*MODELS)
            yield service
        finally:
            server.stop()


def png() -> bytes:
    """Return a PNG that contains the marker."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", IMAGE)
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG", pnginfo=note)
    assert IMAGE.encode() in data.getvalue()
    return data.getvalue()


def messages(last: str = PROMPT) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"Secret: {PROMPT}"}, {"role": "user", "content": last}]


def call(service: Deployment, path: str, body: Any, key: str = KEY, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **headers}
    return ask(service.port, "POST", path, data, all_headers)


def chat(service: Deployment, model: str, **fields: Any) -> Answer:
    return call(service, "/v1/chat/completions", {"model": model, "messages": messages(), **fields})


def refused(service: Deployment) -> list[Answer]:
    """Send a request for each kind of error, the marker in or near the invalid part; return the responses."""
    ok = {"model": "echo", "messages": messages()}
    chats: list[Any] = [
        {**ok, "messages": [{"role": PROMPT, "content": "x"}]},
        {**ok, "messages": [{"role": "user", "content": {"text": PROMPT}}]},
        {
            **ok,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PROMPT}}]}],
        },
        {**ok, "messages": PROMPT},
        {**ok, "temperature": PROMPT},
        {**ok, "stream": PROMPT},
        {**ok, "stop": [PROMPT] * 40},
        {**ok, "stop": ""},
        {**ok, "tools": [{"function": PROMPT}]},
        {**ok, "response_format": {"type": PROMPT}},
        {**ok, "guided_json": PROMPT},
        {**ok, "structured_outputs": {"regex": "a", "structural_tag": PROMPT}},
        {**ok, "max_tokens": 1, "min_tokens": 5},
        {**ok, "chat_template_kwargs": [PROMPT]},
        {**ok, PROMPT: 1, "n": 0},
        json.dumps(ok).encode()[:-2],
        json.dumps(ok).encode() + b"}",
        f'{{"messages": "{PROMPT}\\ud800"}}'.encode(),
        PROMPT.encode(),
        b"\xff" + PROMPT.encode(),
    ]
    if "demo-chat" in MODELS:
        demo = {**ok, "model": "demo-chat"}
        chats += [
            {**demo, "messages": messages(f"{PROMPT} " * 9000)},
            {**demo, "chat_template_kwargs": {"chat_template": PROMPT}},
            {**demo, "logit_bias": {"999999999": 1}},
            {**demo, "guided_json": {"type": PROMPT}},
            {**demo, "guided_regex": f"{PROMPT}("},
            {**demo, "guided_grammar": f"start: {PROMPT}"},
        ]
    answers = [call(service, "/v1/chat/completions", body) for body in chats]
    draw = {"model": "echo-images", "prompt": PROMPT}
    for wrong in (
        {"size": PROMPT},
        {"n": -1},
        {"prompt": [PROMPT]},
        {"response_format": PROMPT},
        {"prompt": f"\0{PROMPT}"},
    ):
        answers.append(call(service, "/v1/images/generations", {**draw, **wrong}))
    broken = png()[:-40]
    links = [
        f"http://127.0.0.1:1/{IMAGE}",
        f"http://user:{IMAGE}@127.0.0.1/",
        f"file:///{IMAGE}",
        IMAGE,
    ]
    links += [f"data:image/png;base64,{base64.b64encode(b'no image ' + IMAGE.encode()).decode()}"]
    for image in links:
        answers.append(call(service, "/v1/images/edits", {**draw, "image": image}))
    answers.append(call(service, "/v1/images/edits", *form(broken[:60] + IMAGE.encode())))
    answers.append(call(service, "/v1/chat/completions", ok, WRONG_KEY))
    answers.append(ask(service.port, "GET", f"/v1/models?key={WRONG_KEY}", headers={"X-Api-Key": WRONG_KEY}))
    return answers


def form(file: bytes) -> tuple[bytes, str]:
    parts = [b'name="prompt"\r\n\r\n' + PROMPT.encode(), b'name="model"\r\n\r\necho-images']
    parts.append(
        b'name="image"; filename="' + IMAGE.encode() + b'.png"\r\nContent-Type: image/png\r\n\r\n' + file
    )
    body = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return body + b"--b--\r\n", KEY


@pytest.mark.slow
def test_nothing_that_clients_send_stays_or_shows(service: KeyedDeployment) -> None:
    client = service.redis.client
    with Events(service) as events:
        # A stream that runs until it is closed, and a second request that waits behind it.
        running = service.stream(PROMPT, "echo", max_tokens=100_000)
        next(running.events())
        waiting = threading.Thread(target=chat, args=(service, "echo"), kwargs={"max_tokens": 2})
        waiting.start()
        wait_until(
            lambda: client.llen("Test:model.echo") or service.running_tasks() > 1,
            timeout_s=20,
            what="one request waits",
        )
        during = check_dump(dump(client))
        assert PROMPT in during, "a running job must be found, or this test looks in the wrong place"
        check_clean(events.asked(), "what workers tell Flower")
        running.close()
        waiting.join(60)
        assert not waiting.is_alive()

        for model in MODELS:
            if model == "echo-images":
                continue
            assert chat(service, model, max_tokens=4).status == 200
            assert b"[DONE]" in chat(service, model, max_tokens=4, stream=True).body
            assert chat(service, model, max_tokens=2, n=2, logprobs=True, seed=1).status == 200
        for fault in ("raise", "out of memory"):
            body = {"model": "echo", "messages": messages(fault)}
            answer = call(service, "/v1/chat/completions", body)
            assert answer.status == 500
            check_clean(answer.body, fault)
        draw = {"model": "echo-images", "prompt": PROMPT}
        assert call(service, "/v1/images/generations", draw).status == 200
        image = base64.b64encode(png()).decode()
        edited = call(service, "/v1/images/edits", {**draw, "image": image})
        assert edited.status == 200
        file, key = form(png())
        answer = call(
            service, "/v1/images/edits", file, key, **{"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert answer.status == 200, answer
        for answer in refused(service):
            assert 400 <= answer.status < 500, answer
            check_clean(answer.body + repr(answer.headers).encode(), "an error")
        wait_until(
            lambda: {"task-received", "task-succeeded"} <= events.types(),
            timeout_s=30,
            what="events of tasks",
        )
        check_clean(events.asked(), "what workers tell Flower")
        wait_until(
            lambda: not any(row["running"] for row in service.worker_rows()), timeout_s=30, what="all done"
        )
        after = check_dump(dump(client))
        jobs = [name for name in dump(client) if name.startswith(b"Test:job:")]
        assert not jobs, "a finished job must be deleted"
        assert IMAGE not in after and PROMPT not in after, "nothing may be left, not even under a TTL"
    check_clean(repr(events.seen).encode(), "an event of Celery")
    assert any("task-received" in event["type"] and event["args"] for event in events.seen)
    for path in ("/metrics", "/v1/workers", "/v1/activity", "/readyz", "/v1/models", "/openapi.json"):
        response, connection = service.request("GET", path)
        check_clean(response.read(), path)
        connection.close()
    check_logs(service.folder)
    check_process_lists()


def check_logs(folder: Path) -> None:
    logs = list(folder.rglob("*.log"))
    assert len(logs) >= 2 + len(MODELS), logs
    for log in logs:
        assert log.stat().st_size, f"{log} is empty, so nothing was checked"
        check_clean(log.read_bytes(), log.name)


def check_process_lists() -> None:
    looked_at = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue  # ended meanwhile
        looked_at += b"gunicorn" in command
        check_clean(command, f"{path}")
    assert looked_at


def test_the_logs_of_a_worker_whose_engine_dies(service: KeyedDeployment) -> None:
    """Last in this file: the engine's thread dies with a prompt, the worker exits, web ends by SIGTERM."""
    worker = next(process for name, process in service.workers.items() if name.startswith("echo-1"))
    answer = call(service, "/v1/chat/completions", {"model": "echo", "messages": messages("die")})
    assert answer.status in (500, 503), answer
    check_clean(answer.body, "the error")
    assert worker.popen.wait(60) != 0
    assert service.web is not None
    service.web.popen.terminate()
    assert service.web.popen.wait(60) == 0
    check_logs(service.folder)


def test_an_unexpected_exception_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("test")
    register_error_handlers(app)

    @app.get("/")
    def broken() -> str:
        raise ValueError(f"can't do {PROMPT}")

    answer = app.test_client().get("/")
    assert answer.status_code == 500
    check_clean(answer.data, "the answer")
    assert "ValueError" in caplog.text and "test_secrecy" in caplog.text
    check_clean(caplog.text.encode(), "the log")


@pytest.mark.parametrize("skip", range(6))
def test_the_search_finds_encoded_markers(skip: int) -> None:
    for marker in MARKERS:
        text = "x" * skip + marker + "yz"
        for data in (text.encode(), base64.b64encode(text.encode()), text.encode().hex().encode()):
            assert markers_in(data) == [marker], (marker, data)
    assert not markers_in(b"nothing")
