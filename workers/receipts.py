"""Writes the receipts of this worker. Imported only where RECEIPTS is set."""

import logging
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

from catalogue import ModelEntry
from config import ConfigurationError
from protocol.leases import WorkerRecord
from protocol.receipts import KeyUnusable, load_or_make_key, sign
from workers.job_log import JobLog

log = logging.getLogger(__name__)

VERSION = 1
"""Of the fields of a receipt."""


class ReceiptWriter:
    """Appends a signed line for each job that the engine had to a file of this worker."""

    def __init__(self, folder: Path, identity: WorkerRecord, entry: ModelEntry) -> None:
        """Raises ConfigurationError if there is no key and none can be made."""
        try:
            self._key = load_or_make_key(folder)
        except KeyUnusable as error:
            raise ConfigurationError(f"environment: RECEIPTS: {error}") from error
        self._file = folder / (re.sub(r"[^\w@.-]", "_", identity.name or identity.cid) + ".jsonl")
        self._lock = threading.Lock()
        self._torn = False
        """The last line was not written whole."""
        self._of_worker = {
            "version": VERSION,
            "project": identity.project,
            "model": identity.model,
            "revision": entry.revision,
            "cid": identity.cid,
            "gpus": identity.gpus,
        }

    def write(self, job: JobLog) -> None:
        """Write the receipt of a job that has ended.

        That it can't be written is logged: the answer is out already.
        """
        if job.gpu_s is None:
            return  # refused before the engine had it
        usage = job.usage
        fields = self._of_worker | {
            "ended_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": job.request_id,
            "task": job.task,
            "outcome": job.outcome,
            "prompt_tokens": usage and usage.prompt_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "images": job.images or None,
            "width": job.width,
            "height": job.height,
            "steps": job.steps_done or None,
            "pixel_steps": job.steps_done * job.width * job.height if job.width and job.height else None,
            "gpu_ms": round(job.gpu_s * 1000),
            "wallet_sha256": job.wallet_sha256,
        }
        line = sign({name: value for name, value in fields.items() if value is not None}, self._key)
        try:
            self._append(line + b"\n")
        except OSError as error:
            log.error("the receipt of request %s was not written: %s", job.request_id, error)

    def _append(self, line: bytes) -> None:
        with self._lock:
            # opened for each line, so that logrotate may rename the file at any time
            file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                line = b"\n" + line if self._torn else line
                self._torn = os.write(file, line) < len(line)
            finally:
                os.close(file)
            if self._torn:
                raise OSError("the disk is full")
