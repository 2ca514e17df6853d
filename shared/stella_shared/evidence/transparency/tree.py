"""Logs as Merkle trees (RFC 9162): the hash of an entry, and that a tree is the beginning of a later one.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from stella_shared.evidence.merkle import EMPTY_ROOT, node

HASH_BYTES: Final = 32
#: A proof in a tree of 2^64 leaves has at most this many hashes; a consistency proof one more.
MAX_PATH: Final = 65


def leaf(entry: bytes) -> bytes:
    """Return the leaf hash of a log entry."""
    return sha256(b"\0" + entry).digest()


def _checked(path: Sequence[bytes]) -> None:
    if len(path) > MAX_PATH or any(len(item) != HASH_BYTES for item in path):
        raise ValueError("a proof with hashes of a wrong length, or with too many")


def check_consistency(old_size: int, old_root: bytes, size: int, root: bytes, path: Sequence[bytes]) -> None:
    """Make sure that the tree of `size` begins with the tree of `old_size` (RFC 9162 2.1.4.2).

    Raises `ValueError` when it does not: the log has two histories, or the proof is none.
    """
    _checked(path)
    if not 0 <= old_size <= size:
        raise ValueError(f"a tree of {size} cannot begin with one of {old_size}")
    if old_size == size:
        if path or old_root != root:
            raise ValueError(f"two different trees of {size}")
        return
    if old_size == 0:
        if path or old_root != EMPTY_ROOT:
            raise ValueError("the proof from an empty tree is empty")
        return
    hashes = list(path) if old_size & (old_size - 1) else [old_root, *path]
    if not hashes:
        raise ValueError("the consistency proof is empty")
    fn, sn = old_size - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    first = second = hashes[0]
    for item in hashes[1:]:
        if sn == 0:
            raise ValueError("the consistency proof is too long")
        if fn & 1 or fn == sn:
            first, second = node(item, first), node(item, second)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            second = node(second, item)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ValueError("the consistency proof is too short")
    if first != old_root or second != root:
        raise ValueError(f"the tree of {size} does not begin with the tree of {old_size} that was seen before")
