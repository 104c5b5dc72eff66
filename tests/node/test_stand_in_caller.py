"""The stand-in's calling side: what it sends, byte for byte, and what it does not let pass."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.go_json import GoDecodeError, decode
from tests.stand_in_caller import CHAT, Answer, NodeCaller, Stream
from tests.stand_in_node import StandInNode

GOOD_CHAT: dict[str, Any] = {
    "code": 0,
    "message": "success",
    "created": 1677652288,
    "model": "Chat",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


class Model:
    """A service with a canned answer that remembers what it was sent."""

    def __init__(self) -> None:
        self.status, self.kind, self.body = 200, "application/json", json.dumps(GOOD_CHAT).encode()
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.peers: set[tuple[str, int]] = set()
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                model.requests.append((dict(self.headers), raw))
                model.peers.add(self.client_address)
                self.send_response(model.status)
                self.send_header("Content-Type", model.kind)
                self.send_header("Content-Length", str(len(model.body)))
                self.end_headers()
                self.wfile.write(model.body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.api = f"http://127.0.0.1:{self.server.server_address[1]}/v1/x"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.server.shutdown()
    model.server.server_close()


@pytest.fixture
def caller() -> Iterator[NodeCaller]:
    caller = NodeCaller()
    yield caller
    caller.close()


def test_a_chat_is_sent_as_the_node_sends_it_over_one_connection(model: Model, caller: NodeCaller) -> None:
    answer = caller.call_chat(model.api, "Chat", None, temperature=0, top_p=0.5, wallet="w")
    caller.call_chat(model.api, "Chat", [])

    assert (answer.code, answer.text) == (0, "hi")
    headers, raw = model.requests[0]
    assert raw == b'{"model":"Chat","messages":null,"stream":false,"top_p":0.5,"wallet":"w"}'
    assert headers["Content-Type"] == "application/json"
    assert "Transfer-Encoding" not in headers
    assert len(model.peers) == 1


def test_fields_left_out_of_an_image_request_arrive_as_zero(model: Model, caller: NodeCaller) -> None:
    model.body = b'{"code":0,"message":"success","created":1,"data":[{"url":"http://u"}]}'

    answer = caller.call_image(model.api, "Draw", "a circle", n=2)

    assert answer.seen["data"] == [{"b64_json": "", "url": "http://u", "revised_prompt": ""}]
    assert json.loads(model.requests[0][1]) == {
        "model": "Draw",
        "prompt": "a circle",
        "n": 2,
        "size": "",
        "width": 0,
        "height": 0,
        "response_format": "",
    }


def test_an_edit_is_a_form_with_the_files_first(model: Model, caller: NodeCaller) -> None:
    model.body = b'{"code":0,"message":"success","created":1,"data":[{"url":"http://u"}]}'

    caller.call_edit(model.api, b"PNG", mask=b"MASK", prompt="blue", project="P")

    headers, raw = model.requests[0]
    assert headers["Content-Type"].startswith("multipart/form-data; boundary=")
    assert (
        b'name="image"; filename="image.png"\r\nContent-Type: application/octet-stream\r\n\r\nPNG\r\n' in raw
    )
    assert b'name="project"\r\n\r\nP\r\n' in raw
    assert raw.index(b'name="mask"') < raw.index(b'name="prompt"')


@pytest.mark.parametrize(
    "body",
    [
        {**GOOD_CHAT, "created": 1677652288.0},
        {**GOOD_CHAT, "code": "0"},
        {**GOOD_CHAT, "usage": {"prompt_tokens": 1.5}},
        {**GOOD_CHAT, "created": float("nan")},
        {**GOOD_CHAT, "choices": [{"message": {"content": [{"type": "text", "text": "hi"}]}}]},
        {**GOOD_CHAT, "choices": []},
        {"error": {"message": "bad"}},
        {"code": 400, "error": {"message": "bad"}},
        [],
    ],
)
def test_an_answer_that_the_node_would_spoil_does_not_pass(
    model: Model, caller: NodeCaller, body: object
) -> None:
    model.body = json.dumps(body).encode()

    with pytest.raises(AssertionError):
        caller.call_chat(model.api, "Chat", [])


def test_json_of_another_type_is_no_json_to_the_node(model: Model, caller: NodeCaller) -> None:
    model.kind = "application/json; charset=utf-8"

    with pytest.raises(AssertionError, match="not JSON to the node"):
        caller.call_chat(model.api, "Chat", [])


def test_the_status_of_json_is_ignored_and_its_code_is_not(model: Model, caller: NodeCaller) -> None:
    model.status, model.body = 503, b'{"code":503,"message":"no worker","error":{"code":"no_worker"}}'

    answer = caller.call_chat(model.api, "Chat", [])

    assert (answer.status, answer.code, answer.message) == (503, 503, "no worker")


def test_a_stream_is_complete_only_with_done(model: Model, caller: NodeCaller) -> None:
    model.kind = "text/event-stream"
    model.body = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n: still here\n\ndata: [DONE]\n\n'
    whole = caller.call_stream(model.api, "Chat", [])
    model.body = model.body.removesuffix(b"data: [DONE]\n\n")
    torn = caller.call_stream(model.api, "Chat", [])

    assert isinstance(whole, Stream)
    assert isinstance(torn, Stream)
    assert (whole.text, whole.done) == ("a", True)
    assert (torn.text, torn.done) == ("a", False)


def test_json_to_a_stream_must_be_an_error(model: Model, caller: NodeCaller) -> None:
    with pytest.raises(AssertionError, match="empty body"):
        caller.call_stream(model.api, "Chat", [])

    model.body = b'{"code":404,"message":"no such model"}'
    answer = caller.call_stream(model.api, "Chat", [])
    assert isinstance(answer, Answer)
    assert answer.code == 404


def test_the_one_with_the_fewest_in_flight_is_picked_then_the_first(node: StandInNode, model: Model) -> None:
    node.add("P", "Chat", model.api + "/1", cid="c-1")
    node.add("P", "Chat", model.api + "/2", cid="c-2")

    with node.picked("P", "Chat") as first, node.picked("P", "Chat") as second:
        assert (first[-1], second[-1]) == ("1", "2")
    with node.picked("P", "Chat") as again, node.picked("P", "Chat", "c-1") as named:
        assert (again[-1], named[-1]) == ("1", "1")
    assert node.call_chat("P", "Chat", []).text == "hi"


def test_names_match_in_any_case_and_null_is_harmless() -> None:
    seen = decode(b'{"Code": 7, "MESSAGE": null, "choices": null, "other": {}}', CHAT)

    assert (seen["code"], seen["message"], seen["choices"]) == (7, "", [])
    with pytest.raises(GoDecodeError, match="follows"):
        decode(b"{} {}", CHAT)
    with pytest.raises(GoDecodeError):
        decode(b'{"code": true}', CHAT)
