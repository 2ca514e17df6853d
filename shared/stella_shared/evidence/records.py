"""The documents of a chain: chain.json, the ledger of a chunk, head.json.  All are canonical JSON.

A *run* is one life of the loaded BPF programs, a *lane* one of its per-CPU number sequences (`wire`).
A ledger is complete in itself: whoever holds the newest one knows where every lane stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from stella_shared.wire import UNNUMBERED_LOSSES, Closing, LaneRow

FORMAT: Final = 1
#: Causes of `filtered` with this prefix are events that never took a number.
KERNEL_FILTER_PREFIX: Final = "kernel_"
#: How many runs that ended are remembered, so that a redelivered batch of theirs is known as a repetition.
ENDED_RUNS_KEPT: Final = 128


class Predecessor(msgspec.Struct, frozen=True):
    """The chain that this one follows, up to its newest statement known, and why it was left."""

    chain_id: str
    index: int
    statement_sha256: str
    reason: str


class Chain(msgspec.Struct, frozen=True):
    """The JSON of `chain.json`.  `created` is UTC, RFC 3339."""

    format: int
    chain_id: str
    node: str
    created: str
    predecessor: Predecessor | None


class Run(msgspec.Struct, frozen=True):
    """Where a run stands at the end of a chunk, and what the chunk holds of it.

    Batches `[first_batch, next_batch)` are settled here, except the half-open ranges in `missing`, which
    never came.  `lanes` has a row for every lane the run ever used; an idle one has `first == next`.
    `filtered_totals` counts `kernel_*` causes since the run began.  A run that has `ended` has no batches in
    later chunks; it ended by its `final` batch, or by the next run's `Closing`, or `unclean` says how.
    `since_ns` is the boot time at which its batch 0 began, "0" while that is not here.
    """

    boot_id: str
    run: str
    since_ns: str
    first_batch: int
    next_batch: int
    missing: list[tuple[int, int]]
    lanes: list[LaneRow]
    filtered_totals: dict[str, int]
    ended: bool
    final: bool
    unclean: str
    closing: Closing | None
    replaced: bool


class Boot(msgspec.Struct, frozen=True):
    """The span of CLOCK_BOOTTIME, as decimal strings, that the chunk's batches of one boot cover."""

    boot_id: str
    start_ns: str
    end_ns: str


class Window(msgspec.Struct, frozen=True):
    """When the chunk was open, by the signer's wall clock (RFC 3339), and the boots it covers."""

    start: str
    end: str
    boots: list[Boot]


class Held(msgspec.Struct, frozen=True):
    """A coverage document that held in the chunk, from boot time `since_ns` of its run on."""

    run: str
    since_ns: str
    document: Any


class Note(msgspec.Struct, frozen=True):
    """What an operator did: `kind` is `cleanup`, `planned_gap`, …; `first` and `last` are chunks, 0 for none."""

    id: str
    kind: str
    at: str
    first: int
    last: int
    text: str


class Ledger(msgspec.Struct, frozen=True):
    """The JSON of `NNNNNN.ledger.json`.

    `previous_ledger_sha256` is empty in the first chunk.  `ended_runs` are runs of earlier chunks.
    """

    format: int
    chain_id: str
    index: int
    previous_ledger_sha256: str
    lines: int
    bytes: int
    sha256: str
    merkle_root: str
    window: Window
    close_reason: str
    runs: list[Run]
    ended_runs: list[str]
    filtered: dict[str, int]
    lost: dict[str, int]
    coverage: list[Held]
    notes: list[Note]


CLOSE_REASONS: Final = ("genesis", "size", "age", "stop", "recovery", "note")


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of `head.json`: the newest statement, kept in the state directory, and where its runs stood.

    It is a function of the newest signed chunk's files, so it can be rebuilt and compared byte for byte.
    """

    format: int
    chain_id: str
    index: int
    chunk_sha256: str
    statement_sha256: str
    key_id: str
    runs: list[Run]
    ended_runs: list[str]


def head_of(ledger: Ledger, statement_sha256: str, key_id: str) -> Head:
    """Return the head that the newest signed chunk stands for."""
    return Head(
        FORMAT,
        ledger.chain_id,
        ledger.index,
        ledger.sha256,
        statement_sha256,
        key_id,
        ledger.runs,
        ledger.ended_runs,
    )


class Accounting(msgspec.Struct, frozen=True):
    """The identity's four numbers: `produced == recorded + filtered + lost` in an honest chunk."""

    produced: int
    recorded: int
    filtered: int
    lost: int


def accounting(ledger: Ledger) -> Accounting:
    """Return the numbers of the identity.  `produced` is counted from the lanes, the rest from what was said."""
    rows = [row for run in ledger.runs for row in run.lanes]
    unnumbered = sum(n for cause, n in ledger.filtered.items() if cause.startswith(KERNEL_FILTER_PREFIX)) + sum(
        n for cause, n in ledger.lost.items() if cause in UNNUMBERED_LOSSES
    )
    return Accounting(
        produced=sum(row.next - row.first for row in rows) + unnumbered,
        recorded=sum(row.recorded for row in rows),
        filtered=sum(ledger.filtered.values()),
        lost=sum(ledger.lost.values()),
    )


def identity_faults(ledger: Ledger) -> list[str]:
    """Return, in words, each way in which a chunk's numbers do not add up; [] when they do."""
    faults = []
    sums = accounting(ledger)
    if sums.produced != sums.recorded + sums.filtered + sums.lost:
        faults.append(
            f"{sums.produced} produced, but {sums.recorded} recorded + {sums.filtered} filtered + {sums.lost} lost"
        )
    if sums.recorded != ledger.lines:
        faults.append(f"{ledger.lines} lines, but the lanes say {sums.recorded} were recorded")
    filtered = lost = 0
    for run in ledger.runs:
        seen: set[int] = set()
        for row in run.lanes:
            filtered += row.filtered
            lost += row.lost
            negative = min(row.lane, row.first, row.recorded, row.filtered, row.lost) < 0
            adds_up = row.next - row.first == row.recorded + row.filtered + row.lost
            if negative or not adds_up or row.lane in seen:
                faults.append(
                    f"run {run.run} lane {row.lane}: numbers [{row.first}, {row.next}), but {row.recorded} "
                    f"recorded + {row.filtered} filtered + {row.lost} lost"
                )
            seen.add(row.lane)
    if min([0, *ledger.filtered.values(), *ledger.lost.values()]) < 0:
        faults.append("a cause has a negative count")
    by_filter = sum(n for cause, n in ledger.filtered.items() if not cause.startswith(KERNEL_FILTER_PREFIX))
    by_loss = sum(n for cause, n in ledger.lost.items() if cause not in UNNUMBERED_LOSSES)
    if filtered != by_filter:
        faults.append(f"lanes say {filtered} filtered, causes say {by_filter}")
    if lost != by_loss:
        faults.append(f"lanes say {lost} lost, causes say {by_loss}")
    return faults


class Standing(msgspec.Struct, frozen=True):
    """Where the runs stand between two chunks: what the next ledger must continue."""

    live: Mapping[str, Run]
    ended: frozenset[str]


def standing_after(runs: list[Run], ended_runs: list[str]) -> Standing:
    """Return where the runs stand after a ledger (or a head) with these lists."""
    return Standing(
        {run.run: run for run in runs if not run.ended},
        frozenset([*ended_runs, *(run.run for run in runs if run.ended)]),
    )


def continuity_faults(before: Standing, ledger: Ledger, *, may_pick_up: bool) -> list[str]:
    """Return, in words, each place where `ledger` does not continue exactly what stood before it.

    `may_pick_up` allows runs to start in the middle: true for the first chunk of a chain with a predecessor.
    """
    faults = []
    rises: dict[str, int] = {}
    here = {run.run for run in ledger.runs}
    if len(here) != len(ledger.runs):
        faults.append("a run is listed twice")
    faults += [f"run {run} was live before and is not mentioned" for run in before.live if run not in here]
    for run in ledger.runs:
        old = before.live.get(run.run)
        if run.run in before.ended:
            faults.append(f"run {run.run} had ended and is back")
        if old is not None and old.boot_id != run.boot_id:
            faults.append(f"run {run.run} has changed its boot id")
        at = {row.lane: row.next for row in old.lanes} if old else {}
        pick_up = may_pick_up and old is None
        if run.first_batch != (old.next_batch if old else 0) and not pick_up:
            faults.append(
                f"run {run.run} continues at batch {run.first_batch}, {old.next_batch if old else 0} was next"
            )
        if run.next_batch < run.first_batch:
            faults.append(f"run {run.run} goes back from batch {run.first_batch} to {run.next_batch}")
        for row in run.lanes:
            if row.first != at.pop(row.lane, 0) and not pick_up:
                faults.append(f"run {run.run} lane {row.lane} does not continue: it starts at {row.first}")
        faults += [f"run {run.run} lane {lane} stood at {n} and is not mentioned" for lane, n in at.items()]
        for cause, total in run.filtered_totals.items():
            rises[cause] = rises.get(cause, 0) + total - (old.filtered_totals.get(cause, 0) if old else 0)
    for cause in sorted({c for c in ledger.filtered if c.startswith(KERNEL_FILTER_PREFIX)} | set(rises)):
        rise, said = rises.get(cause, 0), ledger.filtered.get(cause, 0)
        if rise != said and not may_pick_up:
            faults.append(f"{cause}: the runs' totals rise by {rise}, the chunk says {said}")
    return faults
