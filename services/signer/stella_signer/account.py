"""The accounting of the open chunk: steps in, a ledger out.  Pure: no files, no time.

Every run's lanes are followed from chunk to chunk.  A number between two batches of a run that no batch
accounts for is lost, cause `bus`.  When a run's successor tells what it had taken, the rest is lost, cause
`restart`.  So `produced = recorded + filtered + lost` holds whatever happened on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from stella_shared.evidence import records
from stella_shared.evidence.records import Boot, Held, Run
from stella_shared.wire import Closing, LaneRow
from stella_signer.steps import Finish, GiveUp, Settle, Step

REPLACED = "the next run told nothing of what this one had counted"
_NOTES_MAX = 4
_NOTE_MAX = 200


class _Lane:
    """One lane's numbers in the open chunk: `[first, next)` and what became of them."""

    __slots__ = ("filtered", "first", "lost", "next", "recorded")

    def __init__(self, at: int) -> None:
        self.first = self.next = at
        self.recorded = self.filtered = self.lost = 0


class _RunState:
    """A run, as far as it is settled, and the batches that came early."""

    def __init__(self, boot_id: str, run: str) -> None:
        self.boot_id = boot_id
        self.run = run
        self.first_batch = self.next_batch = 0
        self.missing: list[tuple[int, int]] = []
        self.lanes: dict[int, _Lane] = {}
        self.filtered_totals: dict[str, int] = {}
        self.early: dict[int, Settle] = {}
        self.ended = self.final = False
        self.notes: list[str] = []
        self.closing: Closing | None = None
        self.replaced = False
        self.since_ns = 0
        self.coverage_text = ""
        self.document: Any = None

    @classmethod
    def continued(cls, row: Run) -> _RunState:
        """Return the state of a run that is live at the start of a chunk."""
        state = cls(row.boot_id, row.run)
        state.first_batch = state.next_batch = row.next_batch
        state.lanes = {lane.lane: _Lane(lane.next) for lane in row.lanes}
        state.filtered_totals = dict(row.filtered_totals)
        state.closing, state.replaced = row.closing, row.replaced
        state.since_ns = int(row.since_ns)
        return state

    def row(self) -> Run:
        """Return the run's entry in the ledger."""
        return Run(
            self.boot_id,
            self.run,
            str(self.since_ns),
            self.first_batch,
            self.next_batch,
            self.missing,
            [
                LaneRow(number, lane.first, lane.next, lane.recorded, lane.filtered, lane.lost)
                for number, lane in sorted(self.lanes.items())
            ],
            dict(sorted(self.filtered_totals.items())),
            self.ended,
            self.final,
            "; ".join(self.notes),
            None if self.ended else self.closing,
            self.replaced and not self.ended,
        )


class Account:
    """The open chunk's accounting, and where every live run stands."""

    def __init__(self, runs: list[Run], ended_runs: list[str], coverage: list[Held]) -> None:
        """Begin a chunk that follows a ledger (or a head) with these lists."""
        standing = records.standing_after(runs, ended_runs)
        self._runs = {name: _RunState.continued(row) for name, row in standing.live.items()}
        ended = [*ended_runs, *(run.run for run in runs if run.ended)]
        self._ended = ended[-records.ENDED_RUNS_KEPT :]
        self.lines = self.batches = 0
        self._boots: dict[str, tuple[int, int]] = {}
        self.filtered: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        #: Losses that were found here, not told by a batch.
        self.found_lost: dict[str, int] = {}
        # What held at the end of the last chunk holds at the start of this one.
        newest = {held.run: held for held in coverage}
        self._coverage = [held for name, held in newest.items() if name in self._runs]
        for held in self._coverage:
            self._runs[held.run].document = held.document

    def apply(self, step: Step) -> None:
        """Take one step.  Never fails: what does not fit is noted on the run, and verification will show it."""
        match step:
            case Settle():
                self._take(step)
            case GiveUp():
                if run := self._runs.get(step.run):
                    self._settle(run, step.before)
            case Finish():
                if run := self._runs.get(step.run):
                    self._finish(run)

    # -- questions -------------------------------------------------------------------------------------

    def is_settled(self, run: str, number: int) -> bool:
        """Return whether batch `number` of `run` is in the evidence, or is counted as lost for good."""
        if run in self._ended:
            return True
        state = self._runs.get(run)
        return state is not None and (state.ended or number < state.next_batch or number in state.early)

    def boot_of(self, run: str) -> str | None:
        """Return the boot that `run` belongs to, or None for a run not known."""
        state = self._runs.get(run)
        return state.boot_id if state else None

    def holes(self) -> dict[str, tuple[int, int]]:
        """Return, for each run that waits for a batch while later ones are here, (its next, the lowest of those)."""
        return {
            name: (run.next_batch, min(run.early)) for name, run in self._runs.items() if run.early and not run.ended
        }

    def early(self) -> int:
        """Return how many batches wait for an earlier one.  A chunk closes only when none does."""
        return sum(len(run.early) for run in self._runs.values())

    def progress(self, run: str) -> tuple[int, int]:
        """Return two numbers that change whenever a batch of `run` arrives."""
        state = self._runs[run]
        return state.next_batch, len(state.early)

    def superseded(self) -> list[str]:
        """Return the live runs that another run has followed."""
        return [n for n, run in self._runs.items() if not run.ended and (run.closing or run.replaced)]

    def live(self) -> list[str]:
        """Return the runs from which more is expected."""
        return [n for n, run in self._runs.items() if not (run.ended or run.closing or run.replaced)]

    @property
    def coverages(self) -> int:
        """How many coverage documents the ledger will hold."""
        return len(self._coverage)

    # -- what a ledger says ----------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Return the ledger's entries of all runs of the chunk."""
        return [run.row() for run in self._runs.values()]

    def ended_runs(self) -> list[str]:
        """Return runs that ended in earlier chunks."""
        return list(self._ended)

    def boots(self) -> list[Boot]:
        """Return the boot time that the chunk's batches cover, by boot."""
        return [Boot(boot, str(start), str(end)) for boot, (start, end) in self._boots.items()]

    def coverage(self) -> list[Held]:
        """Return the coverage documents that held, in the order in which they came into force."""
        return list(self._coverage)

    # -- steps -----------------------------------------------------------------------------------------

    def _take(self, batch: Settle) -> None:
        if self.is_settled(batch.run, batch.number):
            return
        run = self._runs.get(batch.run)
        if run is None:
            run = self._runs[batch.run] = _RunState(batch.boot_id, batch.run)
        self.lines += batch.lines
        self.batches += 1
        start, end = self._boots.get(batch.boot_id, (batch.ledger.start_ns, batch.ledger.end_ns))
        self._boots[batch.boot_id] = (min(start, batch.ledger.start_ns), max(end, batch.ledger.end_ns))
        run.early[batch.number] = batch
        self._settle(run, run.next_batch)

    def _settle(self, run: _RunState, before: int) -> None:
        """Settle batches in order; of those below `before`, absent ones are given up."""
        while not run.ended:
            if batch := run.early.pop(run.next_batch, None):
                run.next_batch += 1
                self._settle_one(run, batch)
            elif run.next_batch < before:
                here = [number for number in run.early if number < before]
                to = min(here, default=before)
                run.missing.append((run.next_batch, to))
                run.next_batch = to
            else:
                return

    def _settle_one(self, run: _RunState, batch: Settle) -> None:
        for row in batch.ledger.lanes:
            lane = run.lanes.setdefault(row.lane, _Lane(0))
            hole = row.first - lane.next
            if hole > 0:
                self._lose("bus", hole)
                lane.lost += hole
            elif hole < 0:
                self._note(run, f"batch {batch.number} lane {row.lane} starts at {row.first}, {lane.next} was next")
            lane.next = max(lane.next, row.next)
            lane.recorded += row.recorded
            lane.filtered += row.filtered
            lane.lost += row.lost
        _add(self.lost, batch.ledger.lost)
        self._filter(run, batch.ledger.filtered)
        if batch.coverage and batch.coverage != run.coverage_text:
            run.coverage_text, document = batch.coverage, msgspec.json.decode(batch.coverage)
            if document != run.document:
                run.document = document
                self._coverage.append(Held(run.run, str(batch.ledger.start_ns), document))
        if batch.number == 0:
            run.since_ns = batch.ledger.start_ns
            self._supersede(run, batch.closings)
        if batch.final:
            run.final = run.ended = True
            run.early.clear()

    def _supersede(self, by: _RunState, closings: list[Closing]) -> None:
        """A new run began: what it tells of earlier ones is kept until their last batches had time to come."""
        for closing in closings:
            if closing.run in self._ended or closing.run == by.run:
                continue
            run = self._runs.get(closing.run)
            if run is None:
                # It died before its first batch came here: everything it took is lost.
                run = self._runs[closing.run] = _RunState(closing.boot_id, closing.run)
            if not run.ended:
                run.closing = closing
        for run in self._before(by):
            run.replaced = not run.ended and run.closing is None

    def _before(self, by: _RunState) -> list[_RunState]:
        """Return the runs that are older than `by`: within a boot by its clock, else by who came here first."""
        names = list(self._runs)
        place = names.index(by.run)
        older = []
        for i, run in enumerate(self._runs.values()):
            same_clock = run.boot_id == by.boot_id and run.since_ns and by.since_ns
            if run is not by and (run.since_ns < by.since_ns if same_clock else i < place):
                older.append(run)
        return older

    def _finish(self, run: _RunState) -> None:
        self._settle(run, max(run.early, default=run.next_batch - 1) + 1)
        if run.ended:
            return
        run.ended = True
        run.early.clear()
        if run.closing is None:
            self._note(run, REPLACED)
            return
        for number, taken in sorted(run.closing.taken.items()):
            lane = run.lanes.setdefault(number, _Lane(0))
            left = taken - lane.next
            if left > 0:
                self._lose("restart", left)
                lane.lost += left
                lane.next = taken
            elif left < 0:
                self._note(run, f"lane {number} had taken {taken} by its closing, but {lane.next} were settled")
        rest = {
            cause: max(0, total - run.filtered_totals.get(cause, 0))
            for cause, total in run.closing.filtered.items()
            if cause.startswith(records.KERNEL_FILTER_PREFIX)
        }
        self._filter(run, rest)
        if run.closing.reason:
            self._note(run, run.closing.reason)

    def _filter(self, run: _RunState, counts: Mapping[str, int]) -> None:
        _add(self.filtered, counts)
        kernel = {c: n for c, n in counts.items() if c.startswith(records.KERNEL_FILTER_PREFIX)}
        _add(run.filtered_totals, kernel)

    def _lose(self, cause: str, count: int) -> None:
        _add(self.lost, {cause: count})
        _add(self.found_lost, {cause: count})

    def _note(self, run: _RunState, note: str) -> None:
        if len(run.notes) < _NOTES_MAX:
            run.notes.append(note[:_NOTE_MAX])


def _add(into: dict[str, int], counts: Mapping[str, int]) -> None:
    for cause, count in counts.items():
        if count:
            into[cause] = into.get(cause, 0) + count
