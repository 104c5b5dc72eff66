"""What the console asks for and does, over HTTP: GET /v1/activity, POST /v1/workers/<worker>/drain and
/resume."""

import http.client
import json
from contextlib import closing
from typing import Any
from urllib.parse import quote

from tests.console.conftest import CLIENT_KEY, KEY
from tests.deployment import Deployment, wait_until

SECRET = "a secret prompt"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}".encode().decode("latin-1")}


def request_of(service: Deployment, request_id: str) -> dict[str, Any]:
    """The entry of a request, when it has been written."""

    def find() -> dict[str, Any] | None:
        requests = service.get("/v1/activity")[1]["requests"]
        return next((entry for entry in requests if entry["id"] == request_id), None)

    return wait_until(find, timeout_s=20, what=f"{request_id} is among the ended requests") or {}


def test_ended_requests_are_told_with_times_and_without_prompts(service: Deployment) -> None:
    stream = service.stream(SECRET, "echo", max_tokens=5)
    chat_id = next(stream.events())["id"]
    assert stream.text() and stream.done
    chat = request_of(service, chat_id)
    worker = next(row for row in service.worker_rows() if row["model"] == "echo")
    assert (chat["model"], chat["route"], chat["status"]) == ("echo", "/v1/chat/completions", 200)
    assert (chat["outcome"], chat["cid"]) == ("completed", worker["cid"])
    assert 0 <= chat["queued_ms"] <= chat["first_token_ms"] <= chat["total_ms"]
    assert chat["completion_tokens"] == 5 and chat["images"] is None

    body = {"model": "echo-images", "prompt": SECRET, "n": 2}
    assert service.post("/v1/images/generations", body)[0] == 200
    answer = service.get("/v1/activity")[1]
    newest: Any = wait_until(
        lambda: next((e for e in service.get("/v1/activity")[1]["requests"] if e["images"] == 2), None),
        timeout_s=20,
        what="the images are among the ended requests",
    )
    assert newest["first_token_ms"] is None and newest["completion_tokens"] is None

    status, refused = service.post(
        "/v1/chat/completions",
        {"model": "echo", "messages": [{"role": "user", "content": SECRET}], "n": 9999},
    )
    assert status == 400 and refused["code"] == 400
    assert SECRET not in str(service.get("/v1/activity")[1])
    times = [sample["models"].get("echo", {}).get("first_token_ms") for sample in answer["samples"]]
    assert any(times), "the first token counts in a sample"


def test_a_client_that_leaves_is_told_as_cancelled(service: Deployment) -> None:
    stream = service.stream("Hi", "echo", max_tokens=100000)
    request_id = next(stream.events())["id"]
    stream.close()
    entry = request_of(service, request_id)
    assert (entry["outcome"], entry["status"]) == ("cancelled", 200)
    assert entry["first_token_ms"] is not None and entry["completion_tokens"] is None


def test_queues_are_told_while_requests_wait(service: Deployment) -> None:
    streams = [service.stream("Hi", "echo", max_tokens=100000) for _ in range(2)]
    for stream in streams:
        next(stream.events())
    assert {"model": "echo", "waiting": 0, "running": 2} in service.get("/v1/activity")[1]["queues"]
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)) as waiting:
        waiting.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        wait_until(
            lambda: {"model": "echo", "waiting": 1, "running": 2} in service.get("/v1/activity")[1]["queues"],
            timeout_s=20,
            what="a request for which there is no slot waits",
        )
        for stream in streams:
            stream.close()
        assert waiting.getresponse().status == 200
    wait_until(
        lambda: {"model": "echo", "waiting": 0, "running": 0} in service.get("/v1/activity")[1]["queues"],
        timeout_s=20,
        what="the cancelled requests run no more",
    )


def test_a_wrong_cursor_is_refused(service: Deployment) -> None:
    status, body = service.get("/v1/activity?after=yesterday")
    assert status == 400 and body["error"]["param"] == "after"


def test_a_worker_is_drained_and_resumed_by_cid_and_by_name(service: Deployment) -> None:
    name = next(name for name in service.workers if name.startswith("echo-images"))
    row = service.wait_worker(name, "ready")
    path = f"/v1/workers/{quote(row['cid'], safe='')}"
    assert service.post(f"{path}/drain", {}) == (
        200,
        {"code": 0, "message": "success", "data": {"name": row["name"], "under_drain": True}},
    )
    service.wait_worker(name, "drained")
    assert service.get("/v1/activity")[1]["under_drain"] == [row["name"]]
    status, body = service.post(f"/v1/workers/{quote(row['name'])}/resume", {})
    assert (status, body["data"]) == (200, {"name": row["name"], "under_drain": False})
    service.wait_worker(name, "ready")
    assert service.get("/v1/activity")[1]["under_drain"] == []


def test_what_a_page_of_another_site_could_send_drains_nothing(service: Deployment) -> None:
    path = f"/v1/workers/{service.worker_rows()[0]['cid']}/drain"
    own = {"Origin": service.url}
    assert service.post(path, {}, {"Origin": "http://127.0.0.1:9"})[0] == 403
    assert service.post(path, {}, {"Origin": "null"})[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert service.post(path, b"{}", {**own, "Content-Type": kind})[0] == 415
    assert service.post(path, b"[]", own)[0] == 400
    assert service.post("/v1/workers/nobody/drain", {}, own)[0] == 404
    assert service.get(path)[0] == 405
    assert service.get("/v1/activity")[1]["under_drain"] == []


def test_a_client_is_no_operator(keyed: Deployment) -> None:
    path = f"/v1/workers/{keyed.get('/v1/workers', bearer(CLIENT_KEY))[1]['data'][0]['cid']}"
    for key, expected in ((CLIENT_KEY, 403), ("wrong", 401), (KEY, 200)):
        assert keyed.get("/v1/activity", bearer(key))[0] == expected
        assert keyed.post(f"{path}/resume", {}, bearer(key))[0] == expected
