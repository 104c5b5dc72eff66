"""app.image_input.fetch: what is refused before a connection, and what is bounded after it.

The listener is a real one on loopback that counts connections. `Rerouted` connects to it in place of every
allowed target, so that a URL which is allowed by mistake shows as a connection.
"""

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.image_input.fetch import PARALLEL, PARALLEL_PER_HOST, TOTAL_S, ImageFetcher
from app.image_input.public_address import is_public, is_this_machine
from protocol.errors import InvalidImage, Overloaded
from protocol.image_files import MAX_BYTES

PUBLIC = "93.184.216.34"
TLS = ssl.create_default_context()  # made once, because it reads all certificates of the system


class Listener:
    """A TCP server that answers each connection with the next of `answers` (the last one repeatedly)."""

    def __init__(self) -> None:
        self.answers: list[Callable[[socket.socket], None]] = [reply(body=b"image")]
        self.requests: list[str] = []
        self.connections = 0
        self.tls: ssl.SSLContext | None = None
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            answer = self.answers[min(self.connections, len(self.answers) - 1)]
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection, answer), daemon=True).start()

    def _serve(self, connection: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        try:
            with (
                connection
                if self.tls is None
                else self.tls.wrap_socket(connection, server_side=True) as stream
            ):
                stream.settimeout(30)
                request = b""
                while b"\r\n\r\n" not in request and (part := stream.recv(65536)):
                    request += part
                self.requests.append(request.decode("latin-1"))
                answer(stream)
        except OSError:
            pass

    def close(self) -> None:
        self._server.close()


def reply(status: str = "200 OK", body: bytes = b"", **headers: str) -> Callable[[socket.socket], None]:
    lines = {
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = (
        f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    )
    return lambda stream: stream.sendall(head.encode() + body)


def raw(*parts: bytes, pause_s: float = 0.0, forever: bool = False) -> Callable[[socket.socket], None]:
    """Send the parts as they are, the last repeatedly if `forever`, until the other side closes."""

    def answer(stream: socket.socket) -> None:
        hung_up = threading.Event()
        for part in parts:
            stream.sendall(part)
        while forever:
            stream.sendall(parts[-1])
            hung_up.wait(pause_s)

    return answer


def silent_after(part: bytes) -> Callable[[socket.socket], None]:
    """Send one part, then nothing until the other side closes."""

    def answer(stream: socket.socket) -> None:
        stream.sendall(part)
        stream.recv(1)

    return answer


class Rerouted(ImageFetcher):
    """Connects to the listener in place of every target, and records the target."""

    def __init__(
        self, listener: Listener, names: dict[str, Sequence[str]] | None = None, **options: object
    ) -> None:
        self.went: list[tuple[str, int]] = []
        self.asked: list[str] = []
        self._listener = listener
        self._names = names or {}
        super().__init__(resolve=self._lookup, **{"tls": TLS} | options)  # type: ignore[arg-type]

    def _lookup(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in self._names:
            return self._names[host]
        return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]

    def _connect(self, addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
        self.went.append((addresses[0], port))
        return super()._connect(["127.0.0.1"], self._listener.port, deadline)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def refusal(fetcher: ImageFetcher, url: str) -> str:
    with pytest.raises(InvalidImage) as caught:
        fetcher.fetch(url)
    assert caught.value.param == "image"
    return caught.value.message


ONE_TEXT = (
    "image could not be downloaded; it must be a public http(s) URL on port 80 or 443 that returns a PNG, JPEG or"
    " WEBP image of at most 10 MiB within 15 s"
)

FORBIDDEN_URLS = [
    # loopback in every spelling
    "http://127.0.0.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://0/",
    "http://0.0.0.0/",
    "http://127.255.255.254/",
    "http://①②⑦.0.0.1/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2001:0:7f00:1::]/",
    # private, link-local, shared
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://3232235777/",
    "http://100.64.0.1/",
    "http://169.254.1.1/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://[fd12:3456::1]/",
    "http://[fec0::1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[::10.0.0.1]/",
    "http://[2002:a00:1::]/",
    "http://[64:ff9b::a00:1]/",
    # metadata services
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://0xa9.0xfe.0xa9.0xfe/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:a9fe:a9fe::]/",
    "http://[fd00:ec2::254]/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    # multicast, broadcast, reserved, documentation
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://192.88.99.1/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[100::1]/",
    # names that resolve to what is forbidden
    "http://private.test/",
    "https://private.test/",
    "http://mixed.test/",
    "http://rebinding.test/",
    "http://nothing.test/",
]
MALFORMED_URLS = [
    # userinfo and what parsers disagree about
    "http://public.test@127.0.0.1/",
    "http://user:password@public.test/",
    "http://public.test:80@127.0.0.1/",
    "http://public.test\\@127.0.0.1/",
    "http://127.0.0.1\\@public.test/",
    "http:\\\\public.test/",
    "http://public.test/#@127.0.0.1/",
    "http://public.test#@127.0.0.1/",
    "http://public.test/\r\nHost: 127.0.0.1",
    "http://public.test/\tx",
    "http://pub\tlic.test/",
    "http://public.test/ x",
    " http://public.test/",
    "http://public.test\u2028/",
    "http://public.test/\x00",
    "http://public.test/\x7f",
    "http://[::1/",
    "http://::1/",
    "http://[127.0.0.1]/",
    "http://[v1.x]/",
    "http://public%2etest/",
    "http://a..test/",
    "http:///x",
    "http://",
    "http://:80/",
    "http:public.test/",
    "//public.test/",
    "public.test",
    "",
    # other schemes and ports
    "ftp://public.test/",
    "file:///etc/passwd",
    "gopher://public.test/",
    "unix:///tmp/socket",
    "redis://public.test/",
    "jar:http://public.test/",
    "http://public.test:6379/",
    "http://public.test:22/",
    "http://public.test:1088/",
    "https://public.test:8443/",
    "http://public.test:0/",
    "http://public.test:65616/",
    "http://public.test:99999/",
    "http://public.test:-80/",
    "http://public.test:８０/",
    "http://public.test:/",
    "http://public.test/" + "x" * 9000,
]
HOSTILE_URLS = [*FORBIDDEN_URLS, *MALFORMED_URLS]
# without those that a redirect can't contain, or that become relative to the host that sent it
HOSTILE_LOCATIONS = [
    url
    for url in HOSTILE_URLS
    if url.isascii() and url.isprintable() and url[:1] not in ("", " ", "/") and len(url) < 8000
    if url not in ("public.test", "http:public.test/", "http:///x", "http://")
]
NAMES: dict[str, Sequence[str]] = {
    "public.test": [PUBLIC],
    "private.test": ["10.1.2.3"],
    "mixed.test": [PUBLIC, "127.0.0.1"],
    "rebinding.test": ["127.0.0.1", PUBLIC],
    "nothing.test": [],
}


@pytest.mark.parametrize("url", HOSTILE_URLS, ids=lambda url: repr(url[:40]))
def test_nothing_connects_to_a_hostile_url(listener, url):
    fetcher = Rerouted(listener, NAMES)
    assert refusal(fetcher, url) == ONE_TEXT
    assert fetcher.went == [] and listener.connections == 0


@pytest.mark.parametrize("url", MALFORMED_URLS, ids=lambda url: repr(url[:40]))
def test_malformed_urls_are_refused_before_they_are_resolved(listener, url):
    fetcher = Rerouted(listener, NAMES)
    asked: list[str] = []

    def anything_is_public(host: str, port: int) -> list[str]:
        asked.append(host)
        return [PUBLIC]

    fetcher._resolve = anything_is_public
    assert refusal(fetcher, url) == ONE_TEXT
    assert asked == [] and listener.connections == 0


@pytest.mark.parametrize("url", HOSTILE_LOCATIONS, ids=lambda url: repr(url[:40]))
def test_no_redirect_leads_to_a_hostile_url(listener, url):
    listener.answers = [reply("302 Found", Location=url), reply(body=b"hole")]
    fetcher = Rerouted(listener, NAMES)
    assert refusal(fetcher, "http://public.test/start") == ONE_TEXT
    assert fetcher.went == [(PUBLIC, 80)] and listener.connections == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://public.test/a?b=c",
        "http://PUBLIC.test:80/",
        "http://public.test:443/",
        "http://93.184.216.34/",
        "HTTP://public.test",
    ],
)
def test_a_public_url_is_fetched(listener, url):
    """The control for the tests above: an allowed URL reaches the listener."""
    fetcher = Rerouted(listener, NAMES)
    assert fetcher.fetch(url) == b"image"
    assert fetcher.went[0][0] == PUBLIC and listener.connections == 1


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        PUBLIC,
        "2606:4700::1111",
        "2a00:1450::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "x", "8.8.8", "08.8.8.8", "2606:4700::1111%eth0", "8.8.8.8/32"])
def test_text_that_is_not_an_address_is_not_public(text):
    assert not is_public(text)


def test_an_address_of_this_machine_is_recognised():
    assert is_this_machine("127.0.0.1")
    assert not is_this_machine(PUBLIC)


def test_a_public_address_of_this_machine_is_refused(listener, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.is_this_machine", lambda address: address == PUBLIC)
    assert refusal(Rerouted(listener, NAMES), "http://public.test/") == ONE_TEXT
    assert listener.connections == 0


def test_the_name_is_resolved_once_and_the_checked_address_is_used(listener):
    """DNS rebinding: the name is never resolved a second time."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    fetcher = Rerouted(listener, {})
    fetcher._lookup = None  # type: ignore[assignment]
    asked = []

    def once(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return next(answers)

    fetcher._resolve = once
    assert fetcher.fetch("http://rebind.test/") == b"image"
    assert asked == ["rebind.test"] and fetcher.went == [(PUBLIC, 80)]
    # a redirect to the same name is resolved and checked again
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    listener.answers = [reply("302 Found", Location="http://rebind.test/again")]
    fetcher.went.clear()
    assert refusal(fetcher, "http://rebind.test/") == ONE_TEXT
    assert fetcher.went == [(PUBLIC, 80)]


def test_the_request_has_host_and_only_the_headers_it_needs(listener):
    Rerouted(listener, NAMES).fetch("http://public.test/a%20b/\u00fc?x=\u00e9")
    head = listener.requests[0].split("\r\n")
    assert head[0] == "GET /a%20b/%C3%BC?x=%C3%A9 HTTP/1.1"
    assert {line.split(":")[0] for line in head[1:] if line} == {
        "Host", "Accept", "Accept-Encoding", "User-Agent", "Connection",
    }  # fmt: skip
    assert "Host: public.test" in head and "Accept-Encoding: identity" in head


def test_redirects_are_followed_three_times(listener):
    hop = reply("302 Found", Location="/next")
    listener.answers = [hop, hop, hop, reply(body=b"at last")]
    assert Rerouted(listener, NAMES).fetch("http://public.test/") == b"at last"
    listener.connections, listener.answers = 0, [hop]
    assert refusal(Rerouted(listener, NAMES), "http://public.test/") == ONE_TEXT
    assert listener.connections == 4


def test_proxies_of_the_environment_are_not_used(listener, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Rerouted(listener, NAMES).fetch("http://public.test/") == b"image"


@pytest.mark.parametrize(
    "answer",
    [
        reply("404 Not Found", b"x"),
        reply("204 No Content"),
        reply("206 Partial Content", b"x"),
        reply("500 Oops", b"x"),
        reply("302 Found"),
        reply(body=b"x", Content_Encoding="gzip"),
        reply(body=b"x", Content_Encoding="br"),
        reply(body=b"x", Content_Length=str(MAX_BYTES + 1)),
        reply(body=b"short", Content_Length="100"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal"),
        raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, forever=True),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n", forever=True),
        raw(b"HTTP/1.1 200 OK\r\n", b"X-Header: x\r\n", forever=True),
        raw(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536, forever=True),
        raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
        raw(b""),
    ],
)  # fmt: skip
def test_every_response_that_is_not_an_image_has_the_same_message(listener, answer):
    listener.answers = [answer]
    assert refusal(Rerouted(listener, NAMES), "http://public.test/") == ONE_TEXT


def test_a_body_of_exactly_the_limit_is_accepted(listener):
    listener.answers = [reply(body=b"x" * MAX_BYTES)]
    assert len(Rerouted(listener, NAMES).fetch("http://public.test/")) == MAX_BYTES
    listener.answers = [
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
    ]
    assert Rerouted(listener, NAMES).fetch("http://public.test/") == b"abc"


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x", pause_s=0.02, forever=True),
        raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause_s=0.02, forever=True),
        raw(b"HTTP/1.1 200 OK\r\nX: ", b"x", pause_s=0.02, forever=True),
        raw(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.02, forever=True),
        silent_after(b"H"),
    ],
)
def test_a_slow_response_is_ended_in_time(listener, answer, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.TOTAL_S", 0.5)
    listener.answers = [answer]
    begun = time.monotonic()
    assert refusal(Rerouted(listener, NAMES), "http://public.test/") == ONE_TEXT
    assert 0.4 < time.monotonic() - begun < 30


def test_a_resolver_that_hangs_is_abandoned(listener, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.TOTAL_S", 0.3)
    release = threading.Event()
    fetcher = ImageFetcher(resolve=lambda host, port: [PUBLIC] if release.wait(30) else [])
    assert refusal(fetcher, "http://slow.test/") == ONE_TEXT
    release.set()


def test_only_four_downloads_run_at_a_time(listener):
    go = threading.Event()

    def wait(stream: socket.socket) -> None:
        go.wait(30)
        reply(body=b"image")(stream)

    listener.answers = [wait]
    fetcher = Rerouted(listener, NAMES)
    callers = [threading.Thread(target=fetcher.fetch, args=("http://public.test/",)) for _ in range(6)]
    for caller in callers:
        caller.start()
    until = time.monotonic() + 10
    while len(listener.requests) < 4 and time.monotonic() < until:
        pass
    assert len(listener.requests) == 4 and listener.connections == 4
    go.set()
    for caller in callers:
        caller.join(10)
    assert listener.connections == 6


def test_a_download_that_waits_too_long_for_a_slot_is_refused_and_other_hosts_are_served(
    listener, monkeypatch
):
    monkeypatch.setattr("app.image_input.fetch.SLOT_S", 0.2)
    fetcher = Rerouted(listener, NAMES)
    with ExitStack() as slots:
        for _ in range(PARALLEL_PER_HOST):
            slots.enter_context(fetcher._slot("public.test"))
        with pytest.raises(Overloaded) as caught:
            fetcher.fetch("http://public.test/")
        assert caught.value.retry_after_s
        with fetcher._slot("other.test"):
            pass
    assert fetcher.fetch("http://public.test/") == b"image"
    assert fetcher.fetch("http://public.test/") == b"image"


def test_all_hosts_together_have_a_bound(listener, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.SLOT_S", 0.2)
    fetcher = Rerouted(listener, NAMES)
    with ExitStack() as slots:
        for number in range(PARALLEL):
            slots.enter_context(fetcher._slot(f"{number}.test"))
        with pytest.raises(Overloaded):
            fetcher.fetch("http://public.test/")


def test_a_body_that_arrives_too_slowly_gives_its_slot_up(listener, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.SLOW_AFTER_S", 0.1)
    stop = threading.Event()

    def drips(stream: socket.socket) -> None:
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not stop.wait(0.05):
            stream.sendall(b"x")

    listener.answers = [drips]
    fetcher = Rerouted(listener, NAMES)
    began = time.monotonic()
    assert refusal(fetcher, "http://public.test/") == ONE_TEXT
    assert time.monotonic() - began < TOTAL_S / 2
    stop.set()


def test_allowed_hosts_may_be_private_and_on_any_port(listener):
    here = f"127.0.0.1:{listener.port}"
    assert ImageFetcher(allowed_hosts=[here]).fetch(f"http://{here}/") == b"image"
    assert ImageFetcher(allowed_hosts=["127.0.0.1"]).fetch(f"http://{here}/") == b"image"
    assert listener.connections == 2
    for other in ([], ["127.0.0.1:1"], ["127.0.0.2"], ["localhost"]):
        assert refusal(ImageFetcher(allowed_hosts=other, tls=TLS), f"http://{here}/") == ONE_TEXT
    listener.answers = [reply("302 Found", Location="http://10.0.0.1/")]
    assert refusal(ImageFetcher(allowed_hosts=[here]), f"http://{here}/") == ONE_TEXT
    assert listener.connections == 3


def test_links_to_the_store_are_read_from_it(listener):
    stored = {"a" * 43: b"png"}
    fetcher = Rerouted(listener, public_url="http://127.0.0.1:1088", read_own=stored.get)
    assert fetcher.fetch("http://127.0.0.1:1088/v1/images/files/" + "a" * 43) == b"png"
    with pytest.raises(InvalidImage, match="expired"):
        fetcher.fetch("http://127.0.0.1:1088/v1/images/files/" + "b" * 43)
    for other in ("/v1/models", "/v1/images/files/", "/v1/images/files/../../x", "/v1/images/files/a?b"):
        assert refusal(fetcher, "http://127.0.0.1:1088" + other) == ONE_TEXT
    assert listener.connections == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for public.test in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=public.test"
        " -addext subjectAltName=DNS:public.test -keyout key.pem -out cert.pem"
    )
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl command")
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


@pytest.fixture
def secure(listener: Listener, certificate: Path) -> tuple[Listener, ssl.SSLContext, list[str | None]]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    names: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: names.append(name)
    listener.tls = server
    return listener, ssl.create_default_context(cafile=str(certificate)), names


def test_tls_keeps_the_name_while_connecting_to_the_address(secure):
    listener, trusting, names = secure
    fetcher = Rerouted(listener, NAMES, tls=trusting)
    assert fetcher.fetch("https://public.test/") == b"image"
    assert names == ["public.test"] and fetcher.went == [(PUBLIC, 443)]
    assert "Host: public.test\r\n" in listener.requests[0]


def test_a_certificate_with_another_name_or_issuer_is_refused(secure):
    listener, trusting, _ = secure
    fetcher = Rerouted(listener, {"other.test": [PUBLIC], **NAMES}, tls=trusting)
    assert refusal(fetcher, "https://other.test/") == ONE_TEXT
    assert refusal(Rerouted(listener, NAMES), "https://public.test/") == ONE_TEXT
    assert listener.requests == []


def test_a_redirect_from_https_to_http_is_refused(secure):
    listener, trusting, _ = secure
    listener.answers = [reply("302 Found", Location="http://public.test/")]
    assert refusal(Rerouted(listener, NAMES, tls=trusting), "https://public.test/") == ONE_TEXT
    assert listener.connections == 1


def test_a_handshake_that_never_ends_is_ended(listener, monkeypatch):
    monkeypatch.setattr("app.image_input.fetch.TOTAL_S", 0.5)
    listener.answers = [raw(b"\x16\x03\x03\x40\x00", b"\x02", pause_s=0.02, forever=True)]
    begun = time.monotonic()
    assert refusal(Rerouted(listener, NAMES), "https://public.test/") == ONE_TEXT
    assert time.monotonic() - begun < 30


UNDER_GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, sys, time
import app.image_input.fetch
from app.image_input.fetch import ImageFetcher
from protocol.errors import InvalidImage
good, drip, tls_drip = sys.argv[1:]
app.image_input.fetch.TOTAL_S = 3.0
fetcher = ImageFetcher(allowed_hosts=["127.0.0.1", "localhost"])
gaps, last, done = [], time.monotonic(), False
def tick():
    global last
    while not done:
        gevent.sleep(0.01)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
def refused(url):
    begun = time.monotonic()
    try:
        fetcher.fetch(url)
    except InvalidImage:
        return time.monotonic() - begun
ticker = gevent.spawn(tick)
assert fetcher.fetch(good.replace("127.0.0.1", "localhost")) == b"image"
slow = [gevent.spawn(refused, url) for url in (drip, tls_drip)]
assert fetcher.fetch(good) == b"image"
times = [one.get() for one in slow]
assert all(2.9 < one < 30 for one in times), times
done = True
ticker.join()
# if the download had blocked the loop, it would have made only a few turns
assert len(gaps) > 60, len(gaps)
print("fine")
"""


def test_under_gevent_other_greenlets_run_and_the_time_limit_holds(listener):
    drip, tls_drip = Listener(), Listener()
    drip.answers = [raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause_s=0.02, forever=True)]
    tls_drip.answers = [raw(b"\x16\x03\x03\x40\x00", b"\x02", pause_s=0.02, forever=True)]
    urls = [
        f"http://127.0.0.1:{listener.port}/",
        f"http://127.0.0.1:{drip.port}/",
        f"https://127.0.0.1:{tls_drip.port}/",
    ]
    done = subprocess.run(
        [sys.executable, "-c", UNDER_GEVENT, *urls], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "fine\n", done.stderr
    drip.close()
    tls_drip.close()
