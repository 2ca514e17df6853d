"""Streams the lines of a chunk and checks them against its ledger, in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from stella_shared.evidence import canonical, merkle
from stella_shared.evidence.records import Ledger
from stella_shared.wire import LANE_KINDS, UPROBE_KIND

MAX_LINE_BYTES: Final = 8 << 20
_BLOCK_BYTES: Final = 1 << 20
_FAULTS_MAX: Final = 5


class Digest(msgspec.Struct, frozen=True):
    """What a chunk file is, as bytes.  `complete` is false when it does not end in a newline."""

    bytes: int
    lines: int
    sha256: str
    merkle_root: str
    complete: bool


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the file in blocks."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


class Reader:
    """Splits blocks into lines and digests them on the way.

    Raises `ValueError` for a line over `MAX_LINE_BYTES`.
    """

    def __init__(self) -> None:
        self._hash = sha256()
        self._tree = merkle.frontier()
        self._rest = b""
        self._bytes = 0

    def take(self, block: bytes) -> list[bytes]:
        """Return the lines that `block` completes."""
        self._hash.update(block)
        self._bytes += len(block)
        lines = (self._rest + block).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"line {self._tree.size + len(lines) + 1} is over {MAX_LINE_BYTES} bytes")
        self._tree.add(merkle.leaves(lines))
        return lines

    def digest(self) -> Digest:
        """Return what was read so far."""
        return Digest(self._bytes, self._tree.size, self._hash.hexdigest(), self._tree.root().hex(), not self._rest)


class LineFault(msgspec.Struct, frozen=True):
    """A line that is not what the ledger says.  `code` is one of `report.FAULT_CODES`."""

    code: str
    message: str


class LineChecker:
    """Checks every line's place: its node, boot, run and lane, and that no number comes twice or is outside."""

    def __init__(self, ledger: Ledger, node: str) -> None:
        self._node = node
        self._runs = {run.run: run for run in ledger.runs}
        self._ranges = {(run.run, row.lane): (row.first, row.next) for run in ledger.runs for row in run.lanes}
        self._numbers: dict[tuple[str, int], array[int]] = {place: array("Q") for place in self._ranges}
        self._line = 0
        self._faults: list[LineFault] = []

    def _fault(self, code: str, message: str) -> None:
        if len(self._faults) < _FAULTS_MAX:
            self._faults.append(LineFault(code, message))

    def check(self, lines: list[bytes]) -> None:
        """Check the next lines of the chunk."""
        decode = msgspec.json.Decoder().decode
        for line in lines:
            self._line += 1
            try:
                event = decode(line)
            except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
                self._fault("malformed", f"line {self._line}: {e}")
                continue
            if not isinstance(event, dict):
                self._fault("malformed", f"line {self._line} is no JSON object")
                continue
            if not canonical.line_is_canonical(line, event):
                self._fault("not_canonical", f"line {self._line} is not canonical JSON")
            self._place(event)

    def _place(self, event: dict[str, Any]) -> None:
        name, lane, number = event.get("run"), event.get("lane"), event.get("seq")
        if type(name) is not str or type(lane) is not int or type(number) is not int:
            self._fault("malformed", f"line {self._line} has no run, lane and seq")
            return
        run = self._runs.get(name)
        if run is None:
            self._fault("spliced", f"line {self._line} is of run {name}, which the ledger does not know")
            return
        if event.get("node") != self._node or event.get("boot_id") != run.boot_id:
            node, boot = event.get("node"), event.get("boot_id")
            self._fault("spliced", f"line {self._line} is of node {node!r}, boot {boot!r}")
        first, after = self._ranges.get((name, lane), (0, 0))
        # The uprobe lane settles by count: a preempted program's smaller number may come a chunk later.
        ordered = lane % LANE_KINDS != UPROBE_KIND or first == after
        if ordered and not first <= number < after:
            self._fault("identity_broken", f"line {self._line}: lane {lane} seq {number} is outside [{first}, {after})")
            return
        self._numbers[name, lane].append(number)

    def finish(self) -> list[LineFault]:
        """Return all faults, after counting each lane's numbers."""
        for run in self._runs.values():
            for row in run.lanes:
                numbers = self._numbers[run.run, row.lane]
                here = f"run {run.run} lane {row.lane}"
                if len(numbers) != row.recorded:
                    self._fault(
                        "identity_broken", f"{here}: {row.recorded} recorded, but {len(numbers)} lines are here"
                    )
                ordered = sorted(numbers)
                twice = next((a for a, b in pairwise(ordered) if a == b), None)
                if twice is not None:
                    self._fault("identity_broken", f"{here} seq {twice} is recorded twice")
        return self._faults
