"""Checkpoints: what a log says of itself, signed (C2SP tlog-checkpoint over signed-note).  Pure.

<origin>\\n<size>\\n<base64 root>\\n[extensions\\n]\\n— <key name> <base64(4-byte key id ‖ signature)>\\n…
"""

from __future__ import annotations

from typing import Final

import msgspec

from stella_shared.evidence.canonical import base64_bytes
from stella_shared.evidence.transparency.tree import HASH_BYTES
from stella_shared.evidence.transparency.trust import Log

MAX_BYTES: Final = 64 << 10
_MAX_SIGNATURES: Final = 64
_DASH: Final = "— "


class NoteSignature(msgspec.Struct, frozen=True):
    """One signature line: whose name stands there, the first four bytes of the key's id, the signature."""

    name: str
    key_id: bytes
    signature: bytes


class Checkpoint(msgspec.Struct, frozen=True):
    """A parsed checkpoint.  `note` is what is signed.  Nothing is verified yet."""

    origin: str
    size: int
    root: bytes
    note: bytes
    signatures: list[NoteSignature]


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64_bytes(text)
    except ValueError:
        raise ValueError(f"checkpoint: {what} is no base64") from None


def parse(text: str) -> Checkpoint:
    """Return the checkpoint in `text`.  Raises `ValueError` for what is not of the form."""
    if len(text) > MAX_BYTES or not text.endswith("\n") or text.count("\n\n") != 1:
        raise ValueError("checkpoint: no signed note")
    body, _, signatures = text.partition("\n\n")
    lines = body.split("\n")
    if len(lines) < 3 or not all(lines):
        raise ValueError("checkpoint: fewer than three lines")
    origin, size, root = lines[:3]
    if not (size.isascii() and size.isdigit()) or (size != "0" and size.startswith("0")) or len(size) > 20:
        raise ValueError("checkpoint: the size is no decimal number")
    root_hash = _decoded(root, "the root")
    if len(root_hash) != HASH_BYTES:
        raise ValueError("checkpoint: the root is no SHA-256")
    found = []
    for line in signatures.rstrip("\n").split("\n"):
        name, _, value = line.removeprefix(_DASH).rpartition(" ")
        raw = _decoded(value, "a signature")
        if not line.startswith(_DASH) or not name or len(raw) < 5:
            raise ValueError("checkpoint: a signature line is malformed")
        found.append(NoteSignature(name, raw[:4], raw[4:]))
    if len(found) > _MAX_SIGNATURES:
        raise ValueError("checkpoint: too many signatures")
    return Checkpoint(origin, int(size), root_hash, body.encode() + b"\n", found)


def check_signature(checkpoint: Checkpoint, log: Log) -> None:
    """Make sure that `log` signed the checkpoint and that it is its own.

    Lines of others (witnesses) are passed over.  Raises `ValueError`.
    """
    if checkpoint.origin != log.name and not checkpoint.origin.startswith(f"{log.name} - "):
        raise ValueError(f"the checkpoint is of {checkpoint.origin!r}, not of {log.name!r}")
    for line in checkpoint.signatures:
        if line.name == log.name and line.key_id in log.key_hints and log.signed(line.signature, checkpoint.note):
            return
    raise ValueError(f"the checkpoint is not signed by {log.name!r}")
