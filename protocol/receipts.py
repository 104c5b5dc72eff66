"""Receipts: signed lines about requests, which workers write and anybody who has the public key can check.

A line is a JSON object in one form only: keys sorted, no spaces, UTF-8, no fractions. `signature` (base64,
Ed25519) is of the same object without that key, in the same form.
"""

import base64
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_FILE = "key.pem"
PUBLIC_KEY_FILE = "key.pub"


class KeyUnusable(Exception):
    """Raised for a key file that can't be made, read or used. The message says which and why, in one line."""


def canonical(receipt: dict[str, Any]) -> bytes:
    """Return the one form of a receipt, without a line break."""
    return json.dumps(receipt, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return what receipts name a key by: the first 16 digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(receipt: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """Return the signed line of a receipt, without a line break."""
    receipt = receipt | {"key_id": key_id(key.public_key())}
    signature = base64.b64encode(key.sign(canonical(receipt))).decode()
    return canonical(receipt | {"signature": signature})


def find_fault(line: bytes, key: Ed25519PublicKey) -> str:
    """Return what is wrong with a line (without its line break), or "" if `key` has signed it."""
    try:
        receipt = json.loads(line)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(receipt, dict):
        return "it is not a JSON object"
    signature = receipt.get("signature")
    if not isinstance(signature, str):
        return "it has no signature"
    if receipt.get("key_id") != key_id(key):
        return f"it names another key, {receipt.get('key_id')!r:.40}"
    if line != _canonical_or_none(receipt):
        return "it is not in the form in which receipts are written"
    del receipt["signature"]
    try:
        key.verify(base64.b64decode(signature, validate=True), canonical(receipt))
    except (InvalidSignature, ValueError):
        return "the signature does not fit"
    return ""


def _canonical_or_none(receipt: dict[str, Any]) -> bytes | None:
    try:
        return canonical(receipt)
    except UnicodeEncodeError:  # half of a surrogate pair, as an escape
        return None


def load_or_make_key(folder: Path) -> Ed25519PrivateKey:
    """Return the key of a folder; the first process makes both. Raises KeyUnusable."""
    path = folder / KEY_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _make_key(folder)
        if path.stat().st_mode & 0o077:
            raise KeyUnusable(f"{path} can be read by others than its owner (chmod 600 {path})")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if isinstance(key, Ed25519PrivateKey):
            # here and not where the key is made: that process may have been killed in between
            _replace(folder / PUBLIC_KEY_FILE, _public_pem(key), 0o644)
            return key
    except OSError as error:
        raise KeyUnusable(f"{error.filename or path}: {error.strerror or error}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyUnusable(f"{path} has no private key without a password, in PEM") from error
    raise KeyUnusable(f"{path} has a key of another kind than Ed25519")


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key in PEM. Raises KeyUnusable."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise KeyUnusable(f"{path}: {error.strerror or error}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable(f"{path} has no public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnusable(f"{path} has a key of another kind than Ed25519")
    return key


def _make_key(folder: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    draft = _write_draft(folder / KEY_FILE, pem, 0o600)
    try:
        # several workers may start at once: the first link is the key of all, and it is whole
        os.link(draft, folder / KEY_FILE)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _replace(path: Path, data: bytes, mode: int) -> None:
    if not path.exists() or path.read_bytes() != data:
        os.replace(_write_draft(path, data, mode), path)


def _write_draft(path: Path, data: bytes, mode: int) -> Path:
    # not the process id, which two containers with one folder may share
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    return draft


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
