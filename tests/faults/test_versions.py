"""Two versions of this service on one Redis, as in a rolling upgrade: the checkout and a changed copy."""

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from protocol.versions import PROTOCOL_VERSION
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, wait_until
from tests.faults.conftest import Reader, check_lost, counted

FOLDERS = ("app", "catalogue", "node", "protocol", "workers")
CHANGES = [
    ("protocol/versions.py", f"VERSION = {PROTOCOL_VERSION}\n", f"VERSION = {PROTOCOL_VERSION + 1}\n"),
    # a field more in each text that is sent, and in each job
    (
        "protocol/events.py",
        "    stop_reason: int | str | None = None\n    logprobs: list[TokenLogprob] | None = None\n",
        "    stop_reason: int | str | None = None\n    logprobs: list[TokenLogprob] | None = None\n"
        '    thought: str = "hm"\n',
    ),
    ("protocol/jobs.py", "tag=CHAT.job, omit_defaults=True):", "tag=CHAT.job):"),
    (
        "protocol/jobs.py",
        "    continue_final_message: bool = False\n",
        "    continue_final_message: bool = False\n    effort: int = 1\n",
    ),
    # a state that older versions don't know
    (
        "workers/status.py",
        '            self._state = "draining"\n            self._last_error',
        '            self._state = "retiring"\n            self._last_error',
    ),
    # a record that older versions can't read
    ("protocol/leases.py", "    host: str\n", "    host: str | list[str]\n"),
    (
        "workers/services.py",
        "        host=host,\n",
        '        host=[host] if node_name.startswith("unreadable") else host,\n',
    ),
]


def make_newer(root: Path) -> Path:
    """Copy what web and workers consist of to `root`, and make a later version of it. Returns `root`."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    for name, old, new in CHANGES:
        text = (root / name).read_text()
        assert text.count(old) == 1, f"{name} has changed: {old!r}"
        (root / name).write_text(text.replace(old, new))
    return root


@pytest.fixture
def versions(tmp_path: Path) -> Iterator[tuple[Deployment, Deployment]]:
    """This version with the worker `older`, and a later one with the workers `newer` and `unreadable`."""
    catalogue = ECHO_CATALOGUE.format(step_ms=50, slots=16)
    with ExitStack() as stack:
        this = stack.enter_context(Deployment(tmp_path / "this", catalogue=catalogue))
        later = Deployment(tmp_path / "later", catalogue=catalogue, redis_server=this.redis)
        later.root = make_newer(tmp_path / "code")
        stack.enter_context(later)
        this.redis.start()
        this.launch_web()
        later.launch_web()
        this.start_worker("echo", "older")
        later.start_worker("echo", "newer")
        later.start_worker("echo", "unreadable")
        for service in (this, later):
            service.wait_web()
        later.wait_ready("echo", "echo", "echo")
        wait_until(
            lambda: sorted(row["state"] for row in this.worker_rows()) == ["ready", "ready", "unknown"],
            timeout_s=30,
            what="this version sees all three",
        )
        yield this, later


def stream_from(service: Deployment, cid: str, tokens: int) -> Reader:
    """Open streams at the web process of `service` until the worker `cid` generates one; return that one."""

    def opened() -> Reader | None:
        reader = Reader(service.stream("count", "echo", max_tokens=tokens))
        reader.wait_parts(1)
        found = re.search(rb'"id": ?"([^"]+)"', reader.stream.raw)
        assert found
        claim = service.redis.client.get(f"Test:claim:{found[1].decode()}")
        if claim.decode().startswith(f"{cid}:"):
            return reader
        reader.stream.close()
        return None

    reader = wait_until(opened, timeout_s=60, what=f"a stream from {cid}")
    assert reader is not None
    return reader


def check_serves(service: Deployment) -> None:
    """Check the health of the web process, and that it refuses none of a few requests."""
    assert service.get("/healthz")[0] == 200
    for _ in range(6):
        status, answer = service.chat("hi", "echo", max_tokens=3)
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"] == counted(3)


def has_ready(service: Deployment) -> bool:
    return any(row["state"] == "ready" for row in service.worker_rows())


@pytest.mark.slow
def test_two_versions_serve_side_by_side(versions: tuple[Deployment, Deployment]) -> None:
    this, later = versions
    processes = this.workers | later.workers
    rows = {row["pid"]: row for row in later.worker_rows()}
    cids = {name: rows[process.pid]["cid"] for name, process in processes.items()}
    for service in versions:
        check_serves(service)

    kept = [stream_from(service, cids["newer"], 300) for service in versions]
    cut = [
        stream_from(service, cids[name], 50_000) for service in versions for name in ("older", "unreadable")
    ]
    processes["newer"].signal(signal.SIGTERM)
    wait_until(
        lambda: cids["newer"] in [row["cid"] for row in this.worker_rows() if row["state"] == "retiring"],
        timeout_s=10,
        what="this version sees a state that it does not know",
    )
    for service in versions:
        check_serves(service)
    for name in ("older", "unreadable"):
        processes[name].end()
    for reader in cut:
        check_lost(reader, 30)
    for reader in kept:
        reader.wait_end(60)
        assert reader.done, reader.error
        assert reader.text == counted(300)

    this.start_worker("echo", "older")
    for service in versions:
        wait_until(partial(has_ready, service), timeout_s=60, what="the restarted worker is ready")
        check_serves(service)
    assert this.web is not None and later.web is not None
    told = [line for line in this.web.log.read_text().splitlines() if "another version" in line]
    assert len(told) == 1 and cids["unreadable"] in told[0], told
    assert "another version" not in later.web.log.read_text(), "the later one reads what this one writes"
    for process in (*processes.values(), this.web, later.web):
        assert "Traceback" not in process.log.read_text(), process.name
