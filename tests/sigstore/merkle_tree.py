"""The Merkle tree of a log (RFC 6962, section 2), kept as it grows: no proof walks the leaves again."""

from __future__ import annotations

import hashlib


def leaf_hash(body: bytes) -> bytes:
    """Return the hash of one entry."""
    return hashlib.sha256(b"\0" + body).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(n: int) -> int:
    """Return the largest power of two below `n`."""
    return 1 << ((n - 1).bit_length() - 1)


class Tree:
    """Appends leaves, and answers for every size that it ever had.

    `_levels[k][i]` is the hash of the leaves [i * 2^k, (i + 1) * 2^k), once they are all there.
    """

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = [[]]

    @property
    def size(self) -> int:
        """Return the number of leaves."""
        return len(self._levels[0])

    def append(self, leaf: bytes) -> int:
        """Add the hash of a leaf; return its index."""
        index = self.size
        self._levels[0].append(leaf)
        level = 0
        while len(self._levels[level]) % 2 == 0:
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(node_hash(*self._levels[level][-2:]))
            level += 1
        return index

    def leaf(self, index: int) -> bytes:
        """Return the hash of a leaf."""
        return self._levels[0][index]

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` leaves, or of all."""
        size = self.size if size is None else size
        return self._range(0, size) if size else hashlib.sha256(b"").digest()

    def _range(self, low: int, high: int) -> bytes:
        width = high - low
        if width & (width - 1) == 0 and low % width == 0:
            return self._levels[width.bit_length() - 1][low // width]
        middle = low + _split(width)
        return node_hash(self._range(low, middle), self._range(middle, high))

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the audit path of a leaf in the tree of the first `size` leaves (RFC 6962, 2.1.1)."""
        path: list[bytes] = []
        low, high = 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low = middle
        return path[::-1]

    def consistency(self, first: int, second: int) -> list[bytes]:
        """Return the proof that the tree of `second` leaves begins with that of `first` (RFC 6962, 2.1.2)."""
        if first in (0, second):
            return []
        proof: list[bytes] = []
        low, high, whole = 0, second, True
        while high != first:
            middle = low + _split(high - low)
            if first <= middle:
                proof.append(self._range(middle, high))
                high = middle
            else:
                proof.append(self._range(low, middle))
                low, whole = middle, False
        # The old tree's own last part is known to who holds its root, when it is that whole tree.
        if not whole:
            proof.append(self._range(low, high))
        return proof[::-1]

    def tile(self, level: int, index: int, width: int, size: int) -> bytes | None:
        """Return `width` hashes of a tile (C2SP tlog-tiles), or None when the tree of `size` leaves has not so many."""
        low = index * 256
        if low + width > size >> (8 * level):
            return None
        return b"".join(self._levels[8 * level][low : low + width])
