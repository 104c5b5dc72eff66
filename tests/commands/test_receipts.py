"""Receipts of real workers, and `flask --app wsgi receipts verify`."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import flask, succeeds
from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until

WALLET = "0xA11CE"
HASH = hashlib.sha256(WALLET.encode()).hexdigest()
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("receipts")
    catalogue = ECHO_CATALOGUE.format(step_ms=5, slots=1)
    with Deployment(folder, catalogue=catalogue, RECEIPTS=str(folder / "receipts")) as service:
        yield service.start("echo", "echo-images")


def receipts(service: Deployment, name: str, count: int) -> list[dict[str, Any]]:
    """The receipts of a worker, once there are so many."""
    file = file_of(service, name)

    def written() -> list[str] | None:
        found = file.read_text().splitlines() if file.exists() else []
        return found if len(found) >= count else None

    found = wait_until(written, timeout_s=20, what=f"{count} receipts of {name}") or []
    return [json.loads(line) for line in found]


def file_of(service: Deployment, name: str) -> Path:
    return service.folder / "receipts" / f"{name}@{HOST}.jsonl"


@pytest.mark.slow
def test_receipts_are_written_and_verified_and_changes_are_found(service: Deployment) -> None:
    assert service.chat("a secret", "echo", max_tokens=4, wallet=WALLET)[0] == 200
    stream = service.stream("Hi", "echo")
    next(stream.events())
    stream.close()
    complete, cancelled = receipts(service, "echo-1", 2)
    assert (complete["outcome"], complete["completion_tokens"]) == ("completed", 4)
    assert complete["wallet_sha256"] == HASH and complete["request_id"].startswith("cmpl-")
    assert (
        cancelled["outcome"] == "cancelled" and cancelled["gpu_ms"] > 0 and "wallet_sha256" not in cancelled
    )

    image = {"model": "echo-images", "prompt": "a secret", "n": 2, "wallet": WALLET}
    assert service.post("/v1/images/generations", image)[0] == 200
    (generation,) = receipts(service, "echo-images-2", 1)
    assert generation["wallet_sha256"] == HASH and generation["pixel_steps"] == 64 * 64 * 4

    file = file_of(service, "echo-1")
    assert succeeds(service, "receipts", "verify", str(file)) == "2 of 2 lines are valid receipts\n"
    for text in (file.read_text(), file_of(service, "echo-images-2").read_text()):
        assert WALLET not in text and "a secret" not in text

    changed = service.folder / "changed.jsonl"
    changed.write_text(file.read_text().replace('"outcome":"cancelled"', '"outcome":"completed"'))
    found = flask(service, "receipts", "verify", str(changed))
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        f"{changed}:2: the signature does not fit",
        "1 of 2 lines are valid receipts",
    ]


def test_the_key_can_be_named_and_must_be_known(service: Deployment) -> None:
    file = service.folder / "empty.jsonl"
    file.touch()
    found = flask(service, "receipts", "verify", str(file), RECEIPTS=str(service.folder / "none"))
    assert found.returncode == 78 and "key.pub: No such file" in found.stderr
    key = str(service.folder / "receipts" / "key.pub")
    printed = succeeds(service, "receipts", "verify", str(file), "--key", key, RECEIPTS="/nowhere")
    assert printed == "0 of 0 lines are valid receipts\n"
