"""RFC 6962 Merkle tree hash over evidence lines.

    leaf(line) = SHA-256(0x00 ‖ line without its newline)      node(a, b) = SHA-256(0x01 ‖ a ‖ b)
    root of nothing = SHA-256("")

A frontier takes lines in as they come and holds at most one hash per level, so a chunk of any size closes at
once.  `frontier()` gives the one in C (`merkle.c`, without Python's lock, a tenth of the time); `Frontier` is
the same in Python, for an install without a compiler, and passes the same tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_uint8, c_uint64, c_void_p, create_string_buffer
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final

NATIVE: Final = Path(__file__).parent / "native" / "merkle.so"
HASH_BYTES: Final = 32
EMPTY_ROOT = sha256(b"").digest()


def leaves(lines: Iterable[bytes]) -> list[bytes]:
    """Return the leaf hashes of `lines` (without newlines)."""
    return [sha256(b"\0" + line).digest() for line in lines]


def node(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return sha256(b"\1" + left + right).digest()


class Frontier:
    """An append-only tree: every complete subtree is folded into one hash as soon as it is complete."""

    __slots__ = ("_levels", "size")

    def __init__(self) -> None:
        self._levels: list[bytes | None] = []
        self.size = 0

    def add(self, new: Sequence[bytes]) -> None:
        """Append leaf hashes."""
        self.size += len(new)
        level = 0
        while new:
            if level == len(self._levels):
                self._levels.append(None)
            waiting = self._levels[level]
            row = [waiting, *new] if waiting is not None else list(new)
            self._levels[level] = row.pop() if len(row) % 2 else None
            pairs = iter(row)
            new = [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]
            level += 1

    def add_packed(self, hashes: bytearray, count: int) -> None:
        """Append the first `count` of the leaf hashes that stand back to back in `hashes`, which may be used up."""
        self.add([bytes(hashes[at : at + 32]) for at in range(0, 32 * count, 32)])

    def add_hashes(self, hashes: bytes) -> None:
        """Append leaf hashes that stand back to back."""
        self.add_packed(bytearray(hashes), len(hashes) // HASH_BYTES)

    def root(self) -> bytes:
        """Return the Merkle tree hash of everything added so far."""
        root: bytes | None = None
        for waiting in self._levels:
            if waiting is not None:
                root = waiting if root is None else node(waiting, root)
        return EMPTY_ROOT if root is None else root


class _State(ctypes.Structure):
    # struct frontier of merkle.c
    _fields_ = (("size", c_uint64), ("level", c_uint8 * 32 * 64))


@cache
def library() -> ctypes.CDLL | None:
    """Return the functions of `merkle.c`, or None where they were not built."""
    try:
        lib = ctypes.CDLL(str(NATIVE))
    except OSError:
        return None
    lib.stella_merkle_add.restype = None
    lib.stella_merkle_add.argtypes = (POINTER(_State), c_void_p, c_uint64)
    lib.stella_merkle_leaves.restype = c_uint64
    lib.stella_merkle_leaves.argtypes = (c_void_p, c_uint64, c_uint64, c_void_p, POINTER(c_uint64))
    return lib


class NativeFrontier(Frontier):
    """The frontier in C."""

    __slots__ = ("_lib", "_state")

    def __init__(self, lib: ctypes.CDLL) -> None:
        super().__init__()
        self._lib = lib
        self._state = _State()

    def add(self, new: Sequence[bytes]) -> None:
        """Append leaf hashes."""
        self.add_packed(bytearray(b"".join(new)), len(new))

    def add_packed(self, hashes: bytearray, count: int) -> None:
        """Append the first `count` of the leaf hashes that stand back to back in `hashes`, which are used up."""
        self._lib.stella_merkle_add(byref(self._state), (c_uint8 * len(hashes)).from_buffer(hashes), count)
        self._fold()

    def _fold(self) -> None:
        self.size = int(self._state.size)

    def root(self) -> bytes:
        """Return the Merkle tree hash of everything added so far."""
        self._levels = [
            bytes(self._state.level[n]) if self.size >> n & 1 else None for n in range(self.size.bit_length())
        ]
        return super().root()


def frontier() -> Frontier:
    """Return an empty frontier, the fastest there is."""
    lib = library()
    return Frontier() if lib is None else NativeFrontier(lib)


def leaf_hashes(lines: bytes) -> bytes:
    """Return the leaf hashes of whole lines, back to back."""
    lib = library()
    if lib is None:
        return b"".join(leaves(lines.split(b"\n")[:-1]))
    count = lines.count(b"\n")
    room = create_string_buffer(count * HASH_BYTES)
    lib.stella_merkle_leaves(lines, len(lines), count, room, byref(c_uint64()))
    return room.raw
