"""Makes chains that span months, and exports of them, with the signer's own code."""

from __future__ import annotations

from pathlib import Path

from chain_maker import Node, Source, one

from stella_shared.evidence import export
from stella_shared.evidence.export import Times
from stella_signer import errands

#: When each chunk after the genesis ends; the genesis is made on the day before.
ENDS = ("2025-12-31", "2026-01-10", "2026-01-31", "2026-02-10", "2026-02-28", "2026-03-05")
JANUARY = export.times("2026-01-01", "2026-01-31")
FEBRUARY = export.times("2026-02-01", "2026-02-28")


class Calendar:
    """A wall clock that stands still until it is set."""

    def __init__(self) -> None:
        self.day = "2025-12-30"

    def __call__(self) -> str:
        return f"{self.day}T12:00:00.000000000Z"


def months(folder: Path, name: str = "node-a") -> Node:
    """Return a node with seven chunks: genesis and December 1-2, January 3-4, February 5-6, March 7.

    A chunk begins when the one before ends, so chunk 3 begins in December and chunk 5 in January.
    """
    node = Node(folder, name)
    calendar = Calendar()
    node.clock = calendar  # type: ignore[assignment]
    store = node.open()
    source = Source(name)
    for number, day in enumerate(ENDS):
        store.commit(*one(source.batch({0: 3, 5: 1}, lost=number % 2, kernel_filtered=2, final=day == ENDS[-1])))
        calendar.day = day
        store.close("age")
    store.release()
    return node


def export_to(node: Node, path: Path, asked: Times | None = None, *, proofs: bool = False) -> Path:
    """Write an export as the command does."""
    signed = errands.sign_manifest(node.signals, asked or Times(), proofs=proofs)
    with path.open("wb") as out:
        export.write(node.evidence, signed, out)
    return path
