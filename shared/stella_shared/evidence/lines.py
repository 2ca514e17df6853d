"""The lines of a chunk held against its ledger, one by one.

Python's verdict is the verdict.  `lines.c` takes those lines off it that are beyond doubt (`LineChecker.table`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from stella_shared.evidence import canonical, native_lines
from stella_shared.evidence.lane_numbers import NUMBER_MAX, LaneNumbers, LaneRange
from stella_shared.evidence.native_lines import RunRow
from stella_shared.evidence.records import Ledger
from stella_shared.wire import LANE_KINDS, UPROBE_KIND

MAX_LINE_BYTES: Final = 8 << 20
_BLOCK_BYTES: Final = 1 << 20
_FAULTS_MAX: Final = 5
#: For lines that shrink more than this, the numbers take more memory.
_RATIO_MAX: Final = 200


class Digest(msgspec.Struct, frozen=True):
    """What a chunk file is: `sha256` is of the file, all else of the lines in it.

    `damage` says why lines are not all there: what is behind it is in the digest alone.  `complete` is false when
    the lines do not end in a newline.
    """

    bytes: int
    lines: int
    sha256: str
    merkle_root: str
    complete: bool
    damage: str = ""


def blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's own bytes in blocks."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


class LineFault(msgspec.Struct, frozen=True):
    """A line that is not what the ledger says.  `code` is one of `report.FAULT_CODES`."""

    code: str
    message: str


class LineChecker:
    """Checks every line's place: its node, boot, run and lane, and that no number comes twice or is outside."""

    def __init__(self, ledger: Ledger, node: str) -> None:
        self._node = node
        self._bytes = ledger.bytes
        self._runs = {run.run: run for run in ledger.runs}
        rows = {(run.run, row.lane): row for run in ledger.runs for row in run.lanes}
        order = sorted(rows, key=lambda place: (native_lines.text(place[0]), place[1]))
        # The uprobe lane settles by count: a preempted program's smaller number may come a chunk later.
        self._ranges = {
            place: LaneRange(
                row.lane,
                row.first,
                row.next,
                row.recorded,
                row.lane % LANE_KINDS != UPROBE_KIND or row.first == row.next,
            )
            for place in order
            for row in (rows[place],)
        }
        self._lanes = {place: index for index, place in enumerate(order)}
        self.numbers = LaneNumbers(list(self._ranges.values()))
        self._faults: list[LineFault] = []

    def expect(self, file_bytes: int) -> None:
        """Make room for the lines of a file of that size: as many as the ledger says, within reason."""
        self.numbers.expect(min(self._bytes, file_bytes * _RATIO_MAX))

    def table(self) -> native_lines.Table | None:
        """Return what `lines.c` holds lines against, or None where it was not built."""
        lib = native_lines.library()
        if lib is None:
            return None
        runs: dict[str, RunRow] = {}
        for (name, _), index in self._lanes.items():
            row = runs.get(name) or RunRow(name, self._runs[name].boot_id, index, 0)
            runs[name] = RunRow(name, row.boot_id, row.lanes_at, row.lanes + 1)
        return native_lines.Table(lib, self._node, list(runs.values()), self.numbers.lanes)

    def _fault(self, code: str, message: str) -> None:
        if len(self._faults) < _FAULTS_MAX:
            self._faults.append(LineFault(code, message))

    def judge(self, number: int, line: bytes) -> None:
        """Check one line of the chunk; `number` counts from 1."""
        try:
            event = msgspec.json.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
            self._fault("malformed", f"line {number}: {e}")
            return
        if not isinstance(event, dict):
            self._fault("malformed", f"line {number} is no JSON object")
            return
        if not canonical.line_is_canonical(line, event):
            self._fault("not_canonical", f"line {number} is not canonical JSON")
        self._place(number, event)

    def _place(self, number: int, event: dict[str, Any]) -> None:
        name, lane, seq = event.get("run"), event.get("lane"), event.get("seq")
        if type(name) is not str or type(lane) is not int or type(seq) is not int:
            self._fault("malformed", f"line {number} has no run, lane and seq")
            return
        run = self._runs.get(name)
        if run is None:
            self._fault("spliced", f"line {number} is of run {name}, which the ledger does not know")
            return
        if event.get("node") != self._node or event.get("boot_id") != run.boot_id:
            node, boot = event.get("node"), event.get("boot_id")
            self._fault("spliced", f"line {number} is of node {node!r}, boot {boot!r}")
        row = self._ranges.get((name, lane))
        first, after = (row.first, row.next) if row else (0, 0)
        if row is None or (row.ordered and not first <= seq < after) or not 0 <= seq <= NUMBER_MAX:
            self._fault("identity_broken", f"line {number}: lane {lane} seq {seq} is outside [{first}, {after})")
            return
        self.numbers.add(self._lanes[name, lane], seq)

    def finish(self) -> list[LineFault]:
        """Return all faults, after counting each lane's numbers."""
        for run in self._runs.values():
            for row in run.lanes:
                lane = self._lanes[run.run, row.lane]
                count = self.numbers.count(lane)
                here = f"run {run.run} lane {row.lane}"
                if count != row.recorded:
                    self._fault("identity_broken", f"{here}: {row.recorded} recorded, but {count} lines are here")
                twice = self.numbers.twice(lane)
                if twice is not None:
                    self._fault("identity_broken", f"{here} seq {twice} is recorded twice")
        return self._faults
