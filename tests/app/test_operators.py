"""app.http.operators: whose requests may see all clients' requests and drain workers."""

from collections.abc import Callable

import pytest
from flask import Flask

from app.http.auth import Gate
from app.http.operators import Operators
from app.http.origin import OriginCheck
from config import ConfigurationError, Settings
from protocol.errors import Forbidden

HOME = {"Host": "127.0.0.1:1088"}


def allowed(
    method: Callable[[Operators], None], settings: Settings, headers: dict[str, str], peer: str
) -> bool:
    operators = Operators(settings, OriginCheck(settings), Gate(settings).carries_one_of)
    with Flask("test").test_request_context(headers=headers, environ_overrides={"REMOTE_ADDR": peer}):
        try:
            method(operators)
        except Forbidden:
            return False
    return True


@pytest.mark.parametrize(
    ("peer", "headers", "may"),
    [
        ("127.0.0.1", HOME, True),
        ("::1", {"Host": "[::1]:1088"}, True),
        ("127.0.0.1", {**HOME, "Origin": "http://127.0.0.1:1088"}, True),
        ("127.0.0.1", {"Host": "localhost:1088", "Origin": "http://localhost:1088"}, True),
        ("127.0.0.1", {"Host": "me.example.org", "Origin": "https://me.example.org"}, True),
        ("10.0.0.7", HOME, False),
        ("", HOME, False),
        ("127.0.0.1", {**HOME, "X-Forwarded-For": "127.0.0.1"}, False),
        ("127.0.0.1", {**HOME, "Forwarded": "for=10.0.0.7"}, False),
        ("127.0.0.1", {**HOME, "Origin": "https://evil.example"}, False),
        ("127.0.0.1", {**HOME, "Origin": "null"}, False),
        ("127.0.0.1", {**HOME, "Origin": "http://["}, False),
        ("127.0.0.1", {**HOME, "Origin": "http://127.0.0.1:9999"}, False),
        # a name of another site that resolves to the loopback
        ("127.0.0.1", {"Host": "evil.example:1088", "Origin": "http://evil.example:1088"}, False),
        ("127.0.0.1", {"Host": "evil.example:1088"}, False),
    ],
)
@pytest.mark.parametrize("bind", ["127.0.0.1:1088", "0.0.0.0:1088"])
def test_without_keys_only_the_machine_itself_acts(
    bind: str, peer: str, headers: dict[str, str], may: bool
) -> None:
    settings = Settings(bind=bind, public_url="https://me.example.org", cors_origins=("*",))
    assert allowed(Operators.check_may_act, settings, headers, peer) == may
    assert allowed(Operators.check_may_look, settings, headers, peer)


@pytest.mark.parametrize(
    ("operators", "key", "may"),
    [
        ((), "client", True),
        ((), "operator", True),
        ((), "", False),
        (("operator",), "operator", True),
        (("operator",), "client", False),
        (("operator",), "unknown", False),
    ],
)
def test_with_keys_the_key_counts(operators: tuple[str, ...], key: str, may: bool) -> None:
    settings = Settings(api_keys=("client", "operator"), operator_keys=operators)
    for method in (Operators.check_may_act, Operators.check_may_look):
        headers = {"Authorization": f"Bearer {key}", "Host": "anything"}
        assert allowed(method, settings, headers, "10.0.0.7") == may


def test_operators_keys_must_be_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "a, b")
    monkeypatch.setenv("OPERATOR_KEYS", "b, c")
    with pytest.raises(ConfigurationError, match="OPERATOR_KEYS: has a key that API_KEYS does not have"):
        Settings.from_env()
    monkeypatch.setenv("OPERATOR_KEYS", "b")
    assert Settings.from_env().operator_keys == ("b",)
