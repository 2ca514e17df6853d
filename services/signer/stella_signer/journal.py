"""The open chunk's journal: what has been acknowledged, and everything needed to account for it again.

    entry = length u32 LE ‖ CRC-32 u32 LE of the body ‖ body (MessagePack)

The first entry opens the chunk; each later one is a group commit.  It is written after the data that it
speaks of is durable, so data beyond the last whole entry was never acknowledged and will come again.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import msgspec

from stella_signer.steps import Step

MAX_BODY_BYTES: Final = 256 << 20
_FRAME: Final = struct.Struct("<II")


class Opening(msgspec.Struct, frozen=True, array_like=True, tag="opening"):
    """The head of a journal: which chunk, and when it was opened (UTC, RFC 3339)."""

    format: int
    chain_id: str
    index: int
    opened: str


class Commit(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    """A group commit: where the data file ends after it, its running SHA-256, when, and the steps it took."""

    offset: int
    sha256: bytes
    at: str
    steps: list[Step]


class Replay(msgspec.Struct, frozen=True):
    """A journal read back.  `sizes[i]` is the length of the file up to and with `commits[i]`."""

    opening: Opening | None
    opening_bytes: int
    commits: list[Commit]
    sizes: list[int]


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Opening | Commit)


def frame(entry: Opening | Commit) -> bytes:
    """Return the bytes of an entry."""
    body = _encode(entry)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def replay(data: bytes) -> Replay:
    """Return every whole entry, up to the first that is torn or damaged.  What follows that one is nothing."""
    opening: Opening | None = None
    opening_bytes = at = 0
    commits: list[Commit] = []
    sizes: list[int] = []
    while at + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if length > MAX_BODY_BYTES or len(body) != length or zlib.crc32(body) != crc:
            break
        try:
            entry = _decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError):
            break
        if isinstance(entry, Opening) != (at == 0):
            break
        at += _FRAME.size + length
        if isinstance(entry, Opening):
            opening, opening_bytes = entry, at
        else:
            commits.append(entry)
            sizes.append(at)
    return Replay(opening, opening_bytes, commits, sizes)
