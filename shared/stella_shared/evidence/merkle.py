"""RFC 6962 Merkle tree hash over evidence lines.

    leaf(line) = SHA-256(0x00 ‖ line without its newline)      node(a, b) = SHA-256(0x01 ‖ a ‖ b)
    root of nothing = SHA-256("")

`Frontier` takes lines in as they come and holds at most one hash per level, so a chunk of any size closes
at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

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

    def root(self) -> bytes:
        """Return the Merkle tree hash of everything added so far."""
        root: bytes | None = None
        for waiting in self._levels:
            if waiting is not None:
                root = waiting if root is None else node(waiting, root)
        return EMPTY_ROOT if root is None else root
