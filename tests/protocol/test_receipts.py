"""protocol.receipts: what a signature holds together, and the key that makes it."""

import base64
import json
import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.receipts import (
    KEY_FILE,
    PUBLIC_KEY_FILE,
    KeyUnusable,
    _make_key,
    canonical,
    find_fault,
    key_id,
    load_or_make_key,
    load_public_key,
    sign,
)

RECEIPT = {
    "request_id": "cmpl-1",
    "model": "模型 \u2028",
    "gpu_ms": 12,
    "gpus": ["GPU-1"],
    "outcome": "completed",
}
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
LINE = sign(RECEIPT, KEY)


def test_a_line_is_one_line_and_has_everything() -> None:
    receipt = json.loads(LINE)
    assert b"\n" not in LINE and canonical(receipt) == LINE
    assert receipt.pop("signature") and receipt.pop("key_id") == key_id(KEY.public_key())
    assert receipt == RECEIPT
    assert find_fault(LINE, KEY.public_key()) == ""


def test_another_program_can_check_it_as_the_documentation_says() -> None:
    receipt = json.loads(LINE)
    signature = base64.b64decode(receipt.pop("signature"))
    text = json.dumps(receipt, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    KEY.public_key().verify(signature, text.encode())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (LINE.replace(b'"gpu_ms":12', b'"gpu_ms":11'), "the signature does not fit"),
        (LINE.replace(b"cmpl-1", b"cmpl-2"), "the signature does not fit"),
        (LINE.replace(b'"signature":"', b'"signature":"AA'), "the signature does not fit"),
        (LINE.replace(b'"gpu_ms":12', b'"gpu_ms": 12'), "it is not in the form"),
        (LINE.replace(b'"gpu_ms":12', b'"gpu_ms":99,"gpu_ms":12'), "it is not in the form"),
        (LINE.replace(b"cmpl-1", b"\\ud800"), "it is not in the form"),
        (sign(RECEIPT, Ed25519PrivateKey.generate()), "it names another key"),
        (canonical(RECEIPT), "it has no signature"),
        (b"[]", "it is not a JSON object"),
        (LINE[:-1], "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"", "it is not JSON"),
    ],
)
def test_each_change_is_found(line: bytes, reason: str) -> None:
    assert find_fault(line, KEY.public_key()).startswith(reason)


def test_one_key_is_made_for_all_that_start_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "receipts"
    keys: list[bytes] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        keys.append(load_or_make_key(folder).private_bytes_raw())

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1
    _make_key(folder)  # as a process does that saw no key just before another one made it
    assert load_or_make_key(folder).private_bytes_raw() == keys[0]
    assert load_public_key(folder / PUBLIC_KEY_FILE) == load_or_make_key(folder).public_key()
    assert sorted(os.listdir(folder)) == [KEY_FILE, PUBLIC_KEY_FILE]
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def pem(key: object) -> bytes:
    return key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize(
    ("data", "mode", "reason"),
    [
        (pem(KEY), 0o644, "can be read by others than its owner"),
        (b"no key", 0o600, "has no private key"),
        (pem(generate_private_key(SECP256R1())), 0o600, "of another kind than Ed25519"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused(tmp_path: Path, data: bytes, mode: int, reason: str) -> None:
    (tmp_path / KEY_FILE).write_bytes(data)
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(KeyUnusable, match=reason):
        load_or_make_key(tmp_path)
    assert (tmp_path / KEY_FILE).read_bytes() == data


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyUnusable, match="Not a directory"):
        load_or_make_key(tmp_path / "file" / "folder")
