"""Verifies hostile evidence in little memory: `python -m tests.evidence.hostile FOLDER`, with a small chain in FOLDER.

    documents   JSON that is nothing but lists, of 60 MiB and as many as may be, in the place of each document
    archives    tar files whose bytes and headers are changed at random, the same ones each time

Ends with 0 when every answer was INVALID, a refusal, or the answer about the chain that is really there.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tests.evidence.chain_maker import Node

from stella_shared.errors import StellaError
from stella_shared.evidence import canonical
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.verify import verify_chain

#: What verification may take beyond what the process has as it begins.
MEMORY_BYTES = 768 << 20
ARCHIVE_SECONDS = 20.0


def limit() -> None:
    """Let this process take little more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def documents(node: Node) -> None:
    """Put a bomb in the place of each document."""
    many, most = (b"[" + b"[]," * count + b"[]]" for count in ((60 << 20) // 3, canonical.MAX_VALUES // 2 - 9))
    for path in (
        node.evidence / "chain.json",
        node.file(2, "ledger.json"),
        node.file(2, "dsse.json"),
        node.file(2, "ndjson.zst"),
        node.where.head,
        next((node.evidence / "keys").iterdir()),
    ):
        whole = path.read_bytes()
        for bomb in [many, b'{"x":' + most + b"}"][: 2 if path.name == "chain.json" else 1]:
            path.write_bytes(bomb)
            assert not node.verify().valid, path.name
            path.write_bytes(whole)


def _mutated(tar: bytes, dice: random.Random) -> bytes:
    """Return an archive with a few bytes, blocks or header fields changed; half of the headers get a right checksum."""
    changed = bytearray(tar)
    for _ in range(dice.randint(1, 4)):
        block = dice.randrange(len(changed) // 512) * 512
        match dice.randrange(5):
            case 0:
                changed[dice.randrange(len(changed))] ^= dice.randint(1, 255)
            case 1:
                del changed[block : block + 512 * dice.randint(1, 3)]
            case 2:
                changed[block:block] = changed[dice.randrange(len(changed) // 512) * 512 :][:512]
            case 3:
                field, length = dice.choice([(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (345, 155)])
                choices = [b"../../../tmp/x", b"/etc/x", b"\x80" + b"\xff" * 11, b"77777777777", b"L", b"x", b"g", b"S"]
                value = dice.choice(choices)[:length]
                changed[block + field : block + field + len(value)] = value
            case _:
                del changed[block:]
        if dice.random() < 0.5 and len(changed) > block + 512:
            header = changed[block : block + 512]
            header[148:156] = b" " * 8
            changed[block + 148 : block + 156] = b"%06o\0 " % sum(header)
        if len(changed) < 1024:
            break
    return bytes(changed)


def archives(node: Node, folder: Path, count: int) -> None:
    """Verify changed archives, from a directory of their own, which must be left empty."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(node.evidence, "evidence")
    room = folder / "room"
    room.mkdir()
    tempfile.tempdir = str(room)
    trusted = {node.made.key_id}
    real = verify_chain(node.evidence, trusted_keys=trusted, head=node.where.head)
    before = _tree(folder)
    dice = random.Random(1)
    for n in range(count):
        made = _mutated(whole.getvalue(), dice)
        path = room / ("evidence.tar.gz" if n % 2 else "evidence.tar")
        path.write_bytes(gzip.compress(made, 1) if n % 2 else made)
        began = time.monotonic()
        try:
            report = verify_chain(path, trusted_keys=trusted, head=node.where.head)
            assert not report.valid or _said(report) == _said(real), n
        except StellaError:
            pass
        assert time.monotonic() - began < ARCHIVE_SECONDS, n
        path.unlink()
        assert before == _tree(folder), n


def _said(report: ChainReport) -> object:
    return [(chunk.index, chunk.status, chunk.statement_sha256, chunk.chunk_sha256) for chunk in report.chunks]


def _tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


if __name__ == "__main__":
    at = Path(sys.argv[1])
    small = Node(at)
    limit()
    documents(small)
    archives(small, at, int(sys.argv[2]))
