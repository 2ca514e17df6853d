"""Checks proofs of a log by the algorithms of RFC 9162, which go from the leaf up, as the stand-in's trees do not."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.sigstore.merkle_tree import node_hash


class ProofError(Exception):
    """The proof does not hold."""


def root_of_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root to which an audit path leads (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        raise ProofError("no such leaf")
    node, last, root = index, size - 1, leaf
    for one in path:
        if last == 0:
            raise ProofError("too long")
        if node & 1 or node == last:
            root = node_hash(one, root)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            root = node_hash(root, one)
        node, last = node >> 1, last >> 1
    if last:
        raise ProofError("too short")
    return root


def check_consistency(first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]) -> None:
    """Raise `ProofError` unless the second tree begins with the first (RFC 9162, 2.1.4.2)."""
    if first == second:
        if path or first_root != second_root:
            raise ProofError("trees of one size differ")
        return
    if not path:
        raise ProofError("empty")
    nodes = [first_root, *path] if first & (first - 1) == 0 else list(path)
    node, last = first - 1, second - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    old = new = nodes[0]
    for one in nodes[1:]:
        if last == 0:
            raise ProofError("too long")
        if node & 1 or node == last:
            old, new = node_hash(one, old), node_hash(one, new)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            new = node_hash(new, one)
        node, last = node >> 1, last >> 1
    if (old, new, last) != (first_root, second_root, 0):
        raise ProofError("another history")


@dataclass(frozen=True)
class Checkpoint:
    """A log's signed word on its tree: `text` is what is signed, `signatures` (name, key id, signature) a line."""

    text: bytes
    origin: str
    size: int
    root: bytes
    signatures: list[tuple[str, bytes, bytes]]


def read_checkpoint(note: str) -> Checkpoint:
    """Return what a checkpoint says (C2SP tlog-checkpoint, signed-note)."""
    text, _, lines = note.partition("\n\n")
    origin, size, root, *_ = text.split("\n")
    signatures = []
    for line in lines.splitlines():
        dash, name, value = line.split(" ")
        assert dash == "—", line
        raw = base64.b64decode(value, validate=True)
        signatures.append((name, raw[:4], raw[4:]))
    return Checkpoint(f"{text}\n".encode(), origin, int(size), base64.b64decode(root), signatures)


def tile_path(level: int | str, index: int, width: int = 256) -> str:
    """Return where a tile is read (C2SP tlog-tiles)."""
    path = f"{index % 1000:03d}"
    while index := index // 1000:
        path = f"x{index % 1000:03d}/{path}"
    return f"/tile/{level}/{path}" + (f".p/{width}" if width < 256 else "")


def path_from_tiles(read: Callable[[str], bytes], index: int, size: int) -> list[bytes]:
    """Return the audit path of a leaf, out of tiles that `read` gives for their paths."""

    def tile(level: int, number: int) -> bytes:
        return read(tile_path(level, number, min(256, (size >> (8 * level)) - number * 256)))

    def node(height: int, number: int) -> bytes:
        level, above = divmod(height, 8)
        if above:
            return node_hash(node(height - 1, 2 * number), node(height - 1, 2 * number + 1))
        at = number % 256 * hashlib.sha256().digest_size
        return tile(level, number // 256)[at : at + hashlib.sha256().digest_size]

    def root(low: int, high: int) -> bytes:
        width = high - low
        if width & (width - 1) == 0 and low % width == 0:
            return node(width.bit_length() - 1, low // width)
        middle = low + (1 << ((width - 1).bit_length() - 1))
        return node_hash(root(low, middle), root(middle, high))

    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        if index < middle:
            path.append(root(middle, high))
            high = middle
        else:
            path.append(root(low, middle))
            low = middle
    return path[::-1]
