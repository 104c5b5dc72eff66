"""Addresses and URLs among the settings: what is taken, and what a refusal says."""

import pytest
import redis
from kombu.utils.url import parse_url

from addresses import (
    callable_address,
    check_http_url,
    check_origin,
    check_redis_url,
    is_unspecified,
    split_address,
    without_password,
)


@pytest.mark.parametrize(
    ("address", "called_at"),
    [
        ("127.0.0.1:1088", "127.0.0.1:1088"),
        ("0.0.0.0:1088", "127.0.0.1:1088"),
        ("0:1088", "127.0.0.1:1088"),
        ("[::]:1088", "[::1]:1088"),
        ("[0:0::0]:1088", "[::1]:1088"),
        ("[fe80::1]:1088", "[fe80::1]:1088"),
        ("localhost:1088", "localhost:1088"),
    ],
)
def test_an_address_to_listen_on_is_called_at_the_loopback_of_its_family(
    address: str, called_at: str
) -> None:
    assert callable_address(address) == called_at


@pytest.mark.parametrize(
    "address",
    [
        "",
        "1088",
        ":1088",
        "::1:1088",
        "[::1]",
        "[::g]:1088",
        "*:1088",
        "a..b:1",
        "h:0",
        "h:65536",
        "h:http",
        "h: 1",
    ],
)
def test_what_is_no_address_to_listen_on(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:6000", "ftp://h", "http://", "http://h:x", "http://[::1", "https://:80"]
)
def test_what_is_no_url_to_call(url: str) -> None:
    with pytest.raises(ValueError, match="is not a URL such as"):
        check_http_url(url)


@pytest.mark.parametrize("url", ["http://0.0.0.0:1088", "http://[::]:1088/x"])
def test_an_address_to_listen_on_is_no_url_to_call(url: str) -> None:
    with pytest.raises(ValueError, match="is an address to listen on"):
        check_http_url(url)


def test_host_names_are_not_unspecified() -> None:
    assert not is_unspecified("localhost") and not is_unspecified("127.0.0.1") and not is_unspecified("::1")


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://h",
        "redis://user:p%2Fw%40@h:1/15",
        "rediss://:p@h/0?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false",
    ],
)
def test_redis_py_and_celery_read_the_same_from_a_url_that_is_taken(url: str) -> None:
    check_redis_url(url)
    ours, celerys = redis.connection.parse_url(url), parse_url(url)
    assert ours.get("host") == celerys["hostname"]
    assert ours.get("port") == celerys["port"]
    assert ours.get("password") == celerys["password"] and ours.get("username") == celerys["userid"]
    assert ours.get("db", 0) == int(celerys["virtual_host"] or 0)
    assert "p%2F" not in without_password(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must begin with"),
        ("hidden", "must begin with"),
        ("unix:///run/redis.sock", "sockets"),
        ("redis+socket:///run/redis.sock", "sockets"),
        ("sentinel://h:26379", "Sentinel"),
        ("redis:///0", "names no host"),
        ("redis://h:6379/first", "database"),
        ("redis://h:6379/0;redis://i:6379/0", "database"),
        ("redis://h/0?socket_timeout=1", "unknown option 'socket_timeout'"),
        ("rediss://h/0?ssl_version=1", "unknown option 'ssl_version'"),
        ("redis://h/0?ssl_cert_reqs=none", "redis:// takes none"),
        ("rediss://h/0?ssl_cert_reqs=yes", "must be one of required, optional, none"),
        ("redis://:hid/den@h:6379/0", "must be written as %2F"),
        ("redis://:hid?den@h:6379/0", "must be written as %2F"),
        ("redis://:hid#den@h:6379/0", "must be written as %2F"),
        ("redis://:hid[den@h:6379/0", "must be written as %2F"),
        ("redis://:hidden@h:port/0", "is not redis://"),
        ("redis://:hidden@℀h:1/0", "is not redis://"),
    ],
)
def test_what_is_no_redis_url_and_no_password_is_shown(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_redis_url(url)
    assert "hid" not in str(caught.value) and "den" not in str(caught.value)


def test_a_url_is_shown_without_its_password() -> None:
    url = "rediss://u:p%2F@[::1]:1/3?ssl_keyfile=x"
    assert without_password(url) == "rediss://…@[::1]:1/3"
    assert without_password("redis://h:1/0") == "redis://h:1/0"


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.org",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:3000",
        "https://example.org:80",
        "app://obsidian.md",
        "chrome-extension://abcdefghijklmnop",
    ],
)
def test_an_origin_as_browsers_send_it_is_taken(origin: str) -> None:
    check_origin(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "app.example.org",
        "//app.example.org",
        "https://",
        "https://app.example.org/",
        "https://app.example.org/path",
        "https://app.example.org?query",
        "https://user@app.example.org",
        "https://App.example.org",
        "HTTPS://app.example.org",
        "https://*.example.org",
        "https://käse.example",
        "https://app.example.org:443",
        "http://app.example.org:80",
        "https://app.example.org:0",
        "https://app.example.org:65536",
        "https://app.example.org:port",
        "http://[0:0::1]:3000",
        "http://[::1",
        "http://::1",
        "https://a.example https://b.example",
    ],
)
def test_what_no_browser_sends_as_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin as browsers send it: "):
        check_origin(origin)
