"""workers.receipts: what a worker writes of a job, and what happens to the file meanwhile."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from catalogue import Catalogue
from config import ConfigurationError
from protocol.events import Delta, Event, Failed, Finished, ImageReady, Progress, Usage
from protocol.jobs import ChatJob, ImageJob, Job, SamplingParams
from protocol.receipts import KEY_FILE, find_fault, load_or_make_key
from tests.records import worker_record
from workers.job_log import JobLog
from workers.receipts import ReceiptWriter

ENTRY = Catalogue.model_validate(
    {"project": "P", "models": [{"name": "m", "tasks": ["chat"], "weights": "a/b", "revision": "v1"}]}
).models[0]
IDENTITY = worker_record(name="m-1@host", model="m", gpus=["GPU-1"])
FILE = "m-1@host.jsonl"
CHAT = ChatJob(id="cmpl-1", model="m", messages=[], sampling=SamplingParams(), wallet_sha256="ab")
IMAGE = ImageJob(id="img-1", model="m", task="generation", prompt="a secret")


@pytest.fixture
def writer(tmp_path: Path) -> ReceiptWriter:
    return ReceiptWriter(tmp_path, IDENTITY, ENTRY)


def job_log(job: Job, *events: Event, gpu_s: float | None = 1.5) -> JobLog:
    log = JobLog(job.id, "m", job, 0.1)
    for event in events:
        log.observe(event)
    log.gpu_s = gpu_s
    return log


def lines(file: Path) -> list[dict[str, Any]]:
    """The receipts of a file, whose signatures must fit."""
    found = file.read_bytes().splitlines()
    key = load_or_make_key(file.parent).public_key()
    assert [find_fault(line, key) for line in found] == [""] * len(found)
    return [json.loads(line) for line in found]


def test_a_chat(writer: ReceiptWriter, tmp_path: Path) -> None:
    writer.write(job_log(CHAT, Delta("x", finish_reason="stop"), Finished(Usage(7, 3))))
    (receipt,) = lines(tmp_path / FILE)
    assert receipt.pop("ended_at").endswith("+00:00") and receipt.pop("signature") and receipt.pop("key_id")
    assert receipt == {
        "version": 1,
        "request_id": "cmpl-1",
        "project": "P",
        "model": "m",
        "revision": "v1",
        "cid": "cid",
        "gpus": ["GPU-1"],
        "task": "chat",
        "outcome": "completed",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "gpu_ms": 1500,
        "wallet_sha256": "ab",
    }


def test_images_and_those_that_nobody_received(writer: ReceiptWriter, tmp_path: Path) -> None:
    image = ImageReady(0, 0, 64, 32)
    writer.write(job_log(IMAGE, Progress(8, 8), image, image, Finished()))
    writer.write(job_log(IMAGE, Progress(3, 8), Failed("cancelled", "gone")))
    writer.write(job_log(IMAGE, Failed("engine_error", "refused"), gpu_s=None))
    complete, cancelled = lines(tmp_path / FILE)
    assert (complete["images"], complete["steps"], complete["pixel_steps"]) == (2, 8, 64 * 32 * 8)
    assert (cancelled["outcome"], cancelled["steps"], cancelled["gpu_ms"]) == ("cancelled", 3, 1500)
    assert "images" not in cancelled and "wallet_sha256" not in cancelled
    assert "secret" not in (tmp_path / FILE).read_text()


def test_the_file_may_be_renamed_at_any_time(writer: ReceiptWriter, tmp_path: Path) -> None:
    writer.write(job_log(CHAT))
    (tmp_path / FILE).rename(tmp_path / "old")
    writer.write(job_log(IMAGE))
    assert [receipt["request_id"] for receipt in lines(tmp_path / FILE)] == ["img-1"]
    assert [receipt["request_id"] for receipt in lines(tmp_path / "old")] == ["cmpl-1"]


def test_a_full_disk_costs_a_receipt_and_no_request(
    writer: ReceiptWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).symlink_to("/dev/full")
    writer.write(job_log(CHAT))
    assert "the receipt of request cmpl-1 was not written: [Errno 28]" in caplog.text


def test_a_line_that_is_cut_off_does_not_spoil_the_next(
    writer: ReceiptWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr("workers.receipts.os.write", lambda file, line: write(file, line[:40]))
        writer.write(job_log(CHAT))
    assert "was not written: the disk is full" in caplog.text
    writer.write(job_log(IMAGE))
    torn, whole = (tmp_path / FILE).read_bytes().splitlines()
    key = load_or_make_key(tmp_path).public_key()
    assert find_fault(torn, key) == "it is not JSON" and find_fault(whole, key) == ""


def test_without_a_usable_key_the_worker_does_not_start(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("no key")
    with pytest.raises(ConfigurationError, match=r"^environment: RECEIPTS: .*key\.pem"):
        ReceiptWriter(tmp_path, IDENTITY, ENTRY)
