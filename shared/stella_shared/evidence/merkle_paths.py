"""Inclusion proofs of the tree that `merkle` hashes (RFC 6962 section 2.1.1, RFC 9162 section 2.1.3).

A path is the list of the hashes beside the way from a leaf to the root, the leaf's neighbour first.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from stella_shared.evidence.merkle import node

HASH_BYTES: Final = 32
#: No tree of ours has more than 2^63 leaves.
PATH_MAX: Final = 63


def inclusion_paths(leaf_hashes: bytes | bytearray, indexes: Sequence[int]) -> tuple[list[list[bytes]], bytes]:
    """Return (the path of each leaf in `indexes`, the root) of the tree over leaf hashes that stand back to back.

    Goes through the tree once, level by level, and holds one level and the next.  Raises `ValueError` for an
    index that no leaf has.
    """
    level: bytes | bytearray = leaf_hashes
    size = len(level) // HASH_BYTES
    if not all(0 <= index < size for index in indexes):
        raise ValueError(f"the tree has {size} leaves")
    paths: list[list[bytes]] = [[] for _ in indexes]
    at = list(indexes)
    while size > 1:
        for path, index in zip(paths, at, strict=True):
            beside = (index ^ 1) * HASH_BYTES
            # The last one of an odd row has no neighbour: it is taken up as it is.
            if beside < len(level):
                path.append(bytes(level[beside : beside + HASH_BYTES]))
        at = [index >> 1 for index in at]
        pairs = size // 2 * 2 * HASH_BYTES
        above = bytearray()
        for begin in range(0, pairs, 2 * HASH_BYTES):
            above += sha256(b"\1" + level[begin : begin + 2 * HASH_BYTES]).digest()
        level = above + level[pairs:]
        size = len(level) // HASH_BYTES
    return paths, bytes(level) or sha256(b"").digest()


def root_from_path(leaf_hash: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root that a leaf at `index` of `size` leaves has with this path (RFC 9162 section 2.1.3.2).

    Raises `ValueError` when there is no such leaf, or its path has another length.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    here, last, root = index, size - 1, leaf_hash
    for beside in path:
        if last == 0:
            raise ValueError(f"{len(path)} hashes are more than the path of leaf {index} of {size} has")
        if here & 1 or here == last:
            root = node(beside, root)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            root = node(root, beside)
        here, last = here >> 1, last >> 1
    if last:
        raise ValueError(f"{len(path)} hashes are fewer than the path of leaf {index} of {size} has")
    return root
