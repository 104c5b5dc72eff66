"""What holds for every request: slashes, request ids, and which pages and names may call a service without
keys."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from app import create_app
from catalogue import Catalogue
from config import Settings

CATALOGUE = Catalogue.model_validate(
    {
        "project": "Test",
        "models": [
            {"name": "chat", "tasks": ["chat"], "weights": "echo:"},
            {"name": "images", "tasks": ["generation", "edit"], "weights": "echo:"},
        ],
    }
)


def client(**settings: Any) -> FlaskClient:
    given = {"bind": "127.0.0.1:1088", "node_url": "", "redis_url": "redis://127.0.0.1:1/0", **settings}
    return create_app(Settings(**given), CATALOGUE).test_client()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "//v1//models", "///v1/models//"])
def test_a_slash_too_many_is_served(path: str) -> None:
    response = client().get("/", environ_overrides={"PATH_INFO": path})
    assert response.status_code == 200 and response.get_json()["object"] == "list"


def test_a_model_has_one_row_with_all_its_endpoints() -> None:
    rows = client().get("/v1/models").get_json()["data"]
    assert [row["id"] for row in rows] == ["chat", "images"]
    assert rows[1]["url"].endswith("/v1/images/generations")
    assert {task: url.rpartition("/v1/")[2] for task, url in rows[1]["endpoints"].items()} == {
        "generation": "images/generations",
        "edit": "images/edits",
    }
    assert rows[0]["max_model_len"] is None, "no worker has told it yet"


def test_a_script_name_does_not_move_the_endpoints() -> None:
    response = client().get("/v1/models", environ_overrides={"SCRIPT_NAME": "/elsewhere"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/nothing", 404),
        ("PUT", "/healthz", 405),
        ("POST", "/v1/images/edits", 400),
    ],
)
def test_every_response_has_a_request_id(method: str, path: str, status: int) -> None:
    response = client().open(path, method=method)
    assert response.status_code == status
    assert response.headers["X-Request-Id"].startswith("req-")


@pytest.mark.parametrize("path", ["/healthz", "/nothing"])
def test_a_client_may_name_its_request(path: str) -> None:
    for given in ("7", "a" * 128, "550e8400-e29b-41d4-a716-446655440000", "!#$%&'*+-.^_`|~"):
        assert client().get(path, headers={"X-Request-Id": given}).headers["X-Request-Id"] == given


@pytest.mark.parametrize(
    "given", ["", "a" * 129, "a b", "a,a", "a;b", '"a"', "a/b", "a=b", "é", "<a>", "a\x7f"]
)
def test_a_name_that_is_no_short_token_is_not_repeated(given: str) -> None:
    answer = client().get("/healthz", headers={"X-Request-Id": given}).headers["X-Request-Id"]
    assert answer.startswith("req-")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1088", "127.0.0.1:1088", "[::1]:1088", "models.example.org"]
)
def test_own_names_are_served(host: str) -> None:
    service = client(public_url="https://models.example.org")
    assert service.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1088", "127.0.0.1.evil.example", "[::1", ""])
def test_a_foreign_name_is_refused(host: str) -> None:
    response = client().get("/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert response.get_json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_a_page_of_another_site_is_refused(origin: str) -> None:
    headers = {"Host": "127.0.0.1:1088", "Origin": origin}
    assert client().post("/v1/chat/completions", headers=headers, json={}).status_code == 403


@pytest.mark.parametrize("listed", ["https://app.example", "*"])
def test_a_page_of_a_listed_site_is_served(listed: str) -> None:
    service = client(cors_origins=listed)
    headers = {"Host": "127.0.0.1:1088", "Origin": "https://app.example"}
    response = service.get("/v1/models", headers=headers)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == listed
    foreign_name = service.get("/v1/models", headers={**headers, "Host": "evil.example"})
    assert foreign_name.status_code == 403, "names are checked all the same"


def test_a_page_of_a_site_that_is_not_listed_is_refused() -> None:
    headers = {"Host": "127.0.0.1:1088", "Origin": "https://evil.example"}
    response = client(cors_origins="https://app.example").get("/v1/models", headers=headers)
    assert response.status_code == 403
    assert "Access-Control-Allow-Origin" not in response.headers


def test_cors_is_off_by_default() -> None:
    headers = {"Host": "127.0.0.1:1088", "Origin": "http://localhost:3000"}
    response = client().get("/v1/models", headers=headers)
    assert not any(name.startswith("Access-Control") or name == "Vary" for name, _ in response.headers)


def test_a_page_of_this_machine_is_served() -> None:
    headers = {"Host": "127.0.0.1:1088", "Origin": "http://localhost:3000"}
    assert client().get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("settings", [{"api_keys": "secret"}, {"bind": "192.0.2.1:1088"}])
def test_with_keys_or_on_other_addresses_names_do_not_matter(settings: dict[str, str]) -> None:
    headers = {"Host": "evil.example", "Origin": "https://evil.example", "Authorization": "Bearer secret"}
    assert client(**settings).get("/v1/models", headers=headers).status_code == 200
