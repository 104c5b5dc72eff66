"""The settings: what the environment becomes, and errors that name the variable."""

import socket
from pathlib import Path
from typing import Any

import pytest

from config import ConfigurationError, Settings, default_service_id

NO_ORIGIN = (
    "is not an origin as browsers send it: scheme://host or scheme://host:port in lower case, "
    "without a path and without the scheme's default port"
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_without_keys_the_node_and_users_reach_the_same_listener() -> None:
    settings = Settings(bind="127.0.0.1:1")
    assert (settings.service_url, settings.public_url) == ("http://127.0.0.1:1", "http://127.0.0.1:1")


def test_with_keys_the_node_has_its_own_listener_and_image_links_use_the_public_one() -> None:
    settings = Settings(bind="127.0.0.1:1", node_bind="127.0.0.1:2", api_keys=("key",))
    assert (settings.service_url, settings.public_url) == ("http://127.0.0.1:2", "http://127.0.0.1:1")


def test_image_links_use_service_url_where_only_that_is_set() -> None:
    settings = Settings(service_url="http://10.0.0.1:1088/")
    assert (settings.service_url, settings.public_url) == ("http://10.0.0.1:1088", "http://10.0.0.1:1088")


def test_the_service_id_differs_between_machines_of_one_host_name(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "other"]
    for number, file in enumerate(files):
        file.write_text(f"{number:032x}\n")
    one, other = map(default_service_id, files)

    assert one != other
    assert one == default_service_id(files[0])
    assert one.startswith(f"{socket.gethostname()}-")
    assert f"{0:08x}" not in one, "the id itself must not be shown"


@pytest.mark.parametrize("content", ["", "\n", "\xff"])
def test_without_a_machine_id_the_service_id_is_the_host_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "machine-id").write_text(content, encoding="latin-1")

    assert default_service_id(tmp_path / "machine-id") == socket.gethostname()
    assert default_service_id(tmp_path / "missing") == socket.gethostname()


def test_an_empty_service_id_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_ID", "")
    assert Settings.from_env().service_id == default_service_id()


def test_an_address_to_listen_on_becomes_one_to_call() -> None:
    settings = Settings(bind="0.0.0.0:1")
    assert (settings.service_url, settings.public_url) == ("http://127.0.0.1:1", "http://127.0.0.1:1")
    settings = Settings(bind="[::]:1", node_bind="[::]:2", api_keys=("key",))
    assert (settings.service_url, settings.public_url) == ("http://[::1]:2", "http://[::1]:1")
    (warning,) = [warning for warning in settings.warnings() if "PUBLIC_URL is http://[::1]:1" in warning]
    assert warning.endswith("set it to an address that they reach")


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({}, False),
        ({"service_url": "http://127.0.0.1:1"}, True),
        ({"service_url": "http://10.0.0.1:1"}, True),
        ({"service_url": "http://127.0.0.1:2"}, False),
        ({"service_url": "https://models.example.org"}, False),
        ({"service_url": "http://127.0.0.1:1", "api_keys": ""}, False),
        ({"service_url": "http://127.0.0.1:1", "node_url": ""}, False),
        ({"service_url": "http://10.0.0.2:1", "node_bind": "10.0.0.2:1"}, False),
    ],
)
def test_a_node_that_would_need_a_key_is_warned_of(given: dict[str, str], warned: bool) -> None:
    settings = Settings(**{"bind": "127.0.0.1:1", "node_bind": "127.0.0.1:2", "api_keys": "key", **given})  # type: ignore[arg-type]
    assert any("so its users get 401" in warning for warning in settings.warnings()) == warned


def test_an_empty_folder_of_receipts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEIPTS", "")
    assert Settings.from_env().receipts is None


def test_an_empty_redis_url_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "")
    settings = Settings.from_env()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert "redis_url" not in settings.model_fields_set


@pytest.mark.parametrize(
    ("name", "meant"),
    [("API_KEY", "API_KEYS"), ("MODEL_FILE", "MODELS_FILE"), ("WEB_CONCURENCY", "WEB_CONCURRENCY")],
)
def test_a_variable_that_looks_like_a_setting_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("HOME_URL", "x")
    assert [warning for warning in Settings.from_env().warnings() if "is no setting" in warning] == [
        f"{name} is set, but is no setting; {meant} is one"
    ]


def test_lists_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "one, two,")
    monkeypatch.setenv("ALLOWED_IMAGE_HOSTS", "a:80,b")
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example, http://[::1]:3000")
    settings = Settings.from_env()
    assert settings.api_keys == ("one", "two")
    assert settings.allowed_image_hosts == ("a:80", "b")
    assert settings.cors_origins == ("https://a.example", "http://[::1]:3000")


def test_pages_of_all_sites_without_keys_are_warned_of() -> None:
    def warned(**given: Any) -> bool:
        return any("CORS_ORIGINS is *" in warning for warning in Settings(**given).warnings())

    assert warned(cors_origins="*")
    assert not warned(cors_origins="*", api_keys="key")
    assert not warned(cors_origins="https://a.example")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DRAIN_S", "soon", "Input should be a valid number, unable to parse string as a number"),
        ("DRAIN_S", "-1", "Input should be greater than or equal to 0"),
        ("API_KEYS", " , ", "contains no key; unset it to serve without keys"),
        ("OPERATOR_KEYS", ",", "contains no key; unset it if all of API_KEYS are operators'"),
        ("CORS_ORIGINS", " , ", "contains no origin; unset it to serve without CORS"),
        ("CORS_ORIGINS", "*,https://a.example", "* stands for every origin, so it must be alone"),
        ("CORS_ORIGINS", "https://a.example, A.example", f"'A.example' {NO_ORIGIN}"),
        ("RATE_LIMIT", "60", 'must be like "60/minute" or "100/5 minutes" (second, minute, hour, day)'),
        ("BIND", "1088", "'1088' is not host:port, such as 127.0.0.1:1088 or [::1]:1088"),
        ("FLOWER_BASIC_AUTH", "hidden", "is not user:password"),
        ("FLOWER_BASIC_AUTH", "user:", "is not user:password"),
        ("WEB_CONCURRENCY", "0", "Input should be greater than or equal to 1"),
        ("NODE_BIND", "h", "'h' is not host:port, such as 127.0.0.1:1088 or [::1]:1088"),
        ("NODE_URL", "127.0.0.1:6000", "is not a URL such as http://127.0.0.1:1088"),
        ("SERVICE_URL", "http://0.0.0.0:1", "0.0.0.0 is an address to listen on, which can't be called"),
        (
            "REDIS_URL",
            "redis://:hidden@h/x",
            "ends with a database that is not a number; redis://127.0.0.1:6379/0 has database 0",
        ),
        ("LOG_FORMAT", "xml", "Input should be 'text' or 'json'"),
        ("MAX_WAITING", "", "Input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env()
    assert str(caught.value) == f"environment: {name}: {message}"
