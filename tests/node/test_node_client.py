"""node.client against the stand-in node: each answer of the node, and each way in which there is none."""

import json
import socket
import threading
from dataclasses import replace

import pytest

from catalogue import Catalogue
from config import Settings
from node.client import (
    NodeClient,
    NodeError,
    NodeRefused,
    NodeTimeout,
    NodeUnreachable,
    NodeUnsupported,
)
from node.deployment import Deployment
from node.registration import Registration, default_cid, registration_for
from tests.stand_in_node import StandInNode

CHAT = Registration("P", "Chat", "http://127.0.0.1:1088/v1/chat/completions", 0, "c-1")
DRAW = Registration("P", "Draw", "http://localhost:1088/v1/images/generations", 1, "c-2")


def test_an_entry_is_sent_with_every_field_and_read_back(node: StandInNode) -> None:
    client = NodeClient(node.url)

    client.register_model(CHAT)
    client.register_model(DRAW)

    assert client.models() == [CHAT, DRAW]
    call = node.seen("model/register")[0]
    assert call.body == {"project": "P", "model": "Chat", "api": CHAT.api, "type": 0, "cid": "c-1"}
    # the real node leaves `code` out when it is 0
    assert call.answer == {"message": "ok"}


def test_the_same_entry_again_is_an_update(node: StandInNode) -> None:
    client = NodeClient(node.url)
    client.register_model(CHAT)

    client.register_model(Registration("P", "Chat", "http://127.0.0.1:2000/v1", 0, "c-1"))

    assert [entry.api for entry in client.models()] == ["http://127.0.0.1:2000/v1"]


def test_unregistering_removes_one_entry_and_succeeds_for_an_unknown_one(node: StandInNode) -> None:
    client = NodeClient(node.url)
    client.register_model(CHAT)
    client.register_model(DRAW)

    client.unregister_model("P", "Chat", "c-1")
    client.unregister_model("P", "Chat", "c-1")

    assert client.models() == [DRAW]
    assert node.seen("model/unregister")[1].answer == {"message": "not existed"}


def test_the_project_calls_replace_and_remove_the_whole_list(node: StandInNode) -> None:
    client = NodeClient(node.url)
    client.register_model(CHAT)

    client.register_project("P", [DRAW])
    assert client.models() == [DRAW]

    client.unregister_project("P")
    client.unregister_project("P")
    assert client.models() == []


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"project": ""}, "project"),
        ({"model": ""}, "model"),
        ({"api": ""}, "api"),
        ({"api": "http://0.0.0.0:1088/v1"}, "0.0.0.0"),
        ({"api": "http://127.0.0.2:1088/v1"}, "127.0.0.2"),
        ({"api": "http://web:1088/v1"}, "web"),
        ({"api": "127.0.0.1:1088/v1"}, "api"),
        ({"cid": ""}, "cid"),
    ],
)
def test_a_bad_field_is_refused_with_code_1001_and_its_name(
    node: StandInNode, fields: dict[str, str], complaint: str
) -> None:
    good = {"project": "P", "model": "Chat", "api": CHAT.api, "cid": "c-1"}

    with pytest.raises(NodeRefused, match=complaint) as caught:
        NodeClient(node.url).register_model(Registration(type=0, **(good | fields)))

    assert caught.value.code == 1001


def test_a_wrong_type_is_refused_with_code_1002(node: StandInNode) -> None:
    with pytest.raises(NodeRefused) as caught:
        NodeClient(node.url).register_model(Registration("P", "Chat", CHAT.api, "0", "c-1"))  # type: ignore[arg-type]

    assert caught.value.code == 1002


def test_a_node_that_cannot_save_is_refused_with_code_5000(node: StandInNode) -> None:
    node.behave("refusing", code=5000)

    with pytest.raises(NodeRefused) as caught:
        NodeClient(node.url).register_model(CHAT)

    assert caught.value.code == 5000


def test_a_node_that_is_down_is_unreachable_in_one_short_line(node: StandInNode) -> None:
    node.stop()

    with pytest.raises(NodeUnreachable) as caught:
        NodeClient(node.url).register_model(CHAT)

    assert str(caught.value) == f"node {node.url} is unreachable: Connection refused"


def test_a_slow_node_is_given_more_time_after_its_first_timeout(node: StandInNode) -> None:
    node.behave("slow", delay_s=3600)
    client = NodeClient(node.url, timeout_s=0.2, patient_timeout_s=30)

    with pytest.raises(NodeTimeout, match="did not answer within"):
        client.register_model(CHAT)
    node.behave("slow", delay_s=0.6)
    client.register_model(CHAT)

    assert client.models() == [CHAT]


def test_a_quick_answer_ends_the_patience(node: StandInNode) -> None:
    client = NodeClient(node.url, timeout_s=1.5, patient_timeout_s=30)
    node.behave("slow", delay_s=3600)
    with pytest.raises(NodeTimeout):
        client.register_model(CHAT)
    node.behave("ok")
    client.register_model(CHAT)
    node.behave("slow", delay_s=3600)

    with pytest.raises(NodeTimeout):
        client.register_model(CHAT)


@pytest.mark.parametrize(
    ("answer", "raised"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", NodeRefused),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", NodeRefused),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", NodeRefused),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"code":"1","message":1}', NodeRefused),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}", NodeUnreachable),
        (b"this is not HTTP\r\n\r\n", NodeUnreachable),
        (b"", NodeUnreachable),
    ],
)
def test_another_server_at_the_address_is_one_line_too(answer: bytes, raised: type[NodeError]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(raised) as caught:
            NodeClient(f"http://127.0.0.1:{server.getsockname()[1]}").register_model(CHAT)
        thread.join()

    assert type(caught.value) is raised
    assert "\n" not in str(caught.value)


def test_an_invalid_url_is_one_line_too() -> None:
    with pytest.raises(NodeUnreachable, match="unreachable"):
        NodeClient("6000").models()


def test_a_node_without_calls_for_single_models_is_too_old(node: StandInNode) -> None:
    node.behave("old")

    with pytest.raises(NodeUnsupported, match=r"v0\.2\.1 or newer is needed"):
        NodeClient(node.url).register_model(CHAT)

    assert not node.seen("project/register")


def test_proxies_of_the_environment_are_not_used(node: StandInNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    NodeClient(node.url).register_model(CHAT)

    assert node.cids() == ["c-1"]


@pytest.mark.parametrize(
    ("tasks", "path", "kind"),
    [
        (["chat"], "/v1/chat/completions", 0),
        (["generation"], "/v1/images/generations", 1),
        (["generation", "edit"], "/v1/images/generations", 1),
        (["edit"], "/v1/images/edits", 2),
    ],
)
def test_what_is_registered_for_a_model(tasks: list[str], path: str, kind: int, settings: Settings) -> None:
    catalogue = Catalogue.model_validate(
        {"project": "P", "models": [{"name": "M", "tasks": tasks, "weights": "w"}]}
    )

    registration = registration_for(catalogue.models[0], settings, "P", "c-1")

    assert registration == Registration("P", "M", f"http://127.0.0.1:1088{path}", kind, "c-1")


def test_our_list_is_the_ready_workers_of_this_node(deployment: Deployment, record) -> None:
    records = [
        record("ready"),
        record("loading", state="loading"),
        record("lost", state="lost"),
        record("elsewhere", node="http://127.0.0.1:7000"),
        record("other-machine", service_id="host-2"),
        record("no-node", node=""),
    ]

    assert [entry.cid for entry in deployment.registrations(records)] == ["ready"]


def test_a_default_cid_is_stable_and_ours_by_form() -> None:
    cid = default_cid("host.1", "P", "h", "GPU-1", "Chat")

    assert cid == default_cid("host.1", "P", "h", "GPU-1", "Chat")
    assert cid != default_cid("host.1", "P", "hG", "PU-1", "Chat")


def test_an_entry_is_ours_by_the_form_of_its_cid(settings: Settings) -> None:
    deployment = Deployment(settings.model_copy(update={"service_id": "host.1"}), "P", "P")
    cid = default_cid("host.1", "P", "h", "GPU-1", "Chat")
    entry = Registration("P", "Chat", "http://127.0.0.1:9/v1", 0, cid)

    assert deployment.is_ours(entry)
    for other in (cid + "0", "x" + cid, cid.replace("host.1", "hostx1"), cid + "\n", "d15c4007271b"):
        assert not deployment.is_ours(replace(entry, cid=other))
    assert not deployment.is_ours(replace(entry, project="Q"))
    assert not Deployment(deployment.settings, "another namespace", "P").is_ours(entry)
    assert not Deployment(settings.model_copy(update={"service_id": "host"}), "P", "P").is_ours(entry)


def test_the_networks_lists_are_not_the_nodes_own(node: StandInNode) -> None:
    """Why `models` doesn't read them: most nodes refuse, as this one does."""
    with pytest.raises(NodeRefused) as caught:
        NodeClient(node.url)._call("GET", "/api/v0/ai/projects/models?project=P")

    assert caught.value.code == 1010
    assert json.dumps(node.seen("projects/models?project=P")[0].answer["data"]) == "[]"
