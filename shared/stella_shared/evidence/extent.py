"""How much of a chain is here: all of it, a part that a signed manifest declares, or less than there should be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from stella_shared.evidence import names
from stella_shared.evidence.lines import blocks
from stella_shared.evidence.manifest import Manifest
from stella_shared.evidence.report import ChunkReport, Fault, HeadCheck

COMPLETE: Final = "complete"
RANGE: Final = "range"


def first_chunk(declared: list[Manifest], kinds: Mapping[int, Collection[str]]) -> int:
    """Return the chunk with which this evidence begins: 1, unless a manifest declares a later one.

    It does not when the chunks before are here all the same.
    """
    first = min((found.predicate.first for found in declared), default=names.FIRST_INDEX)
    earlier = [index for index, files in kinds.items() if index < first and (index < first - 1 or names.DATA in files)]
    return names.FIRST_INDEX if earlier else first


def faults(
    declared: Manifest, directory: Path, statements: Mapping[int, str], last: int, chunks: list[ChunkReport]
) -> list[Fault]:
    """Return where the evidence is not what a manifest says.

    `statements` are the digests of the statements that are here, `last` the newest signed chunk.  The lines were
    digested with their chunk already; what is missing of chunks is told there as well.
    """
    told = declared.predicate
    found = [
        Fault("forked", end.index, "a manifest names another statement than the one that is here")
        for end in (told.anchor, told.head)
        if end is not None and statements.get(end.index, end.statement_sha256) != end.statement_sha256
    ]
    if told.last > last:
        found.append(Fault("truncated", last + 1, f"the evidence ends before chunk {told.last}: a manifest has it"))
    lines = {chunk.index: chunk.chunk_sha256 for chunk in chunks}
    for name, digest in declared.digests().items():
        file = names.parse_chunk_file(name)
        chunk = file.index if file else None
        path = directory / name
        if file is not None and file.kind == names.DATA:
            if lines.get(file.index, digest) not in (digest, ""):
                found.append(Fault("forked", chunk, f"a manifest lists another {name} than the one that was signed"))
        elif path.is_symlink() or not path.is_file():
            if chunk is None or chunk <= last:
                found.append(Fault("missing", chunk, f"{name} is missing: a manifest lists it"))
        elif _digest(path) != digest:
            found.append(Fault("edited", chunk, f"{name} is not what a manifest lists"))
    return found


def declared_end(declared: list[Manifest]) -> HeadCheck:
    """Return the newest end that a manifest tells of: what the end is compared with where nothing is pinned."""
    newest = max((found.predicate for found in declared), key=lambda told: told.last, default=None)
    if newest is None:
        return HeadCheck()
    known = newest.head.statement_sha256 if newest.head.index == newest.last else ""
    return HeadCheck(names.MANIFEST, newest.last, known)


def _digest(path: Path) -> str:
    digest = sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def state(faults: list[Fault], first: int, last: int, declared: list[Manifest]) -> str:
    """Return the word for how much of the chain is here."""
    codes = {fault.code for fault in faults}
    if "forked" in codes:
        return "forked"
    if any(fault.code == "missing" and fault.chunk is not None for fault in faults):
        return "gap"
    if "truncated" in codes:
        return "truncated"
    newest = max((found.predicate.head.index for found in declared), default=last)
    return COMPLETE if first == names.FIRST_INDEX and last >= newest else RANGE
