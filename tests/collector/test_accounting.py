"""The books of the collector, against simulated lanes whose truth is known: every number is settled once."""

from __future__ import annotations

import struct
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stella_collector.accounting import NUMBERED_CAUSES, Accountant, LaneCounters, join
from stella_shared.errors import BrokenPromise
from stella_shared.wire import LANE_KINDS, LaneRow, Ledger, ledger_faults

LANES = LANE_KINDS
UPROBE = 3
LANE = st.integers(0, LANES - 1)
CAUSE = st.integers(0, 2)
_SEEN = struct.Struct("<4Q")


class Lanes:
    """The kernel's side: lanes with numbers, a ring, and counters; and what truly became of each number."""

    def __init__(self) -> None:
        self.taken = [0] * LANES
        self.lost = [[0, 0, 0] for _ in range(LANES)]
        self.filtered = [[0, 0, 0] for _ in range(LANES)]
        self.ring: list[tuple[int, int]] = []
        #: Numbers that were taken and neither submitted nor lost yet; one at a time in a strict lane.
        self.open: list[list[int]] = [[] for _ in range(LANES)]
        self.seen = [[0, 0, 0, 0] for _ in range(LANES)]
        self.missed = 0

    def take(self, lane: int) -> None:
        if lane == UPROBE or not self.open[lane]:
            self.open[lane].append(self.taken[lane])
            self.taken[lane] += 1

    def finish(self, lane: int, which: int, cause: int | None) -> None:
        """End a program: its record reaches the ring, or its number is lost for a cause."""
        if not self.open[lane]:
            return
        number = self.open[lane].pop(which % len(self.open[lane]))
        if cause is None:
            self.ring.append((lane, number))
        else:
            self.lost[lane][cause] += 1

    def counters(self) -> list[LaneCounters]:
        return [
            LaneCounters(self.taken[i], tuple(self.lost[i]), tuple(self.filtered[i]))  # type: ignore[arg-type]
            for i in range(LANES)
        ]

    def drain(self, most: int) -> int:
        """The reader's part: take up to `most` records; return how many are left."""
        for lane, number in self.ring[:most]:
            row = self.seen[lane]
            row[1] += 1
            if lane != UPROBE:
                assert number >= row[0]
                row[2] += number - row[0]
                row[0] = number + 1
        del self.ring[:most]
        return len(self.ring)

    def seen_bytes(self) -> bytes:
        return b"".join(_SEEN.pack(*row) for row in self.seen)


class Books(RuleBasedStateMachine):
    """Programs run on lanes while drains read racing counters; the ledgers must add up to the truth."""

    @initialize()
    def load(self) -> None:
        self.kernel = Lanes()
        self.accountant = Accountant(LANES)
        self.accountant.begin(100)
        self.now = 100
        self.at = [0] * LANES
        self.recorded = 0
        self.told: Counter[str] = Counter()
        self.told_filtered: Counter[str] = Counter()

    def work(self, steps: list[tuple[int, int, int | None]]) -> None:
        """Let programs run between two reads of the drain."""
        for lane, which, cause in steps:
            self.kernel.take(lane)
            if which:
                self.kernel.finish(lane, which, cause)

    @rule(lane=LANE)
    def begin_a_program(self, lane: int) -> None:
        self.kernel.take(lane)

    @rule(lane=LANE, which=st.integers(0, 5), cause=st.one_of(st.none(), CAUSE))
    def end_a_program(self, lane: int, which: int, cause: int | None) -> None:
        self.kernel.finish(lane, which, cause)

    @rule(lane=LANE, n=st.integers(1, 30), cause=CAUSE)
    def lose_a_row(self, lane: int, n: int, cause: int) -> None:
        for _ in range(n):
            self.kernel.take(lane)
            self.kernel.finish(lane, 0, cause)

    @rule(lane=LANE, kind=CAUSE, n=st.integers(1, 5))
    def filter_some(self, lane: int, kind: int, n: int) -> None:
        self.kernel.filtered[lane][kind] += n

    @rule(n=st.integers(1, 3))
    def miss_some(self, n: int) -> None:
        self.kernel.missed += n

    steps = st.lists(st.tuples(LANE, st.integers(0, 3), st.one_of(st.none(), CAUSE)), max_size=4)

    @rule(most=st.one_of(st.integers(0, 6), st.just(10**6)), a=steps, b=steps, c=steps, d=steps)
    def drain(self, most: int, a: list, b: list, c: list, d: list) -> None:
        """A drain as app.py does it, with programs running between every two of its reads."""
        lost_before = self.kernel.counters()
        self.work(a)
        taken_before = self.kernel.counters()
        self.work(b)
        left = self.kernel.drain(most)
        self.work(c)  # the position of the producer was read before these
        after = self.kernel.counters()
        self.work(d)
        self.settle(lost_before, taken_before, after, emptied=not left)

    def settle(self, lost_before: list, taken_before: list, after: list, *, emptied: bool, last: bool = False) -> None:
        self.now += 1
        ledger = self.accountant.settle(
            now_ns=self.now,
            lost_before=lost_before,
            taken_before=taken_before,
            after=after,
            seen=self.kernel.seen_bytes(),
            emptied=emptied,
            missed=self.kernel.missed,
            last=last,
        )
        assert [] == ledger_faults(ledger)
        assert (self.now - 1, self.now) == (ledger.start_ns, ledger.end_ns)
        for row in ledger.lanes:
            assert row.first == self.at[row.lane]
            assert row.next > row.first or last
            assert row.next <= self.kernel.taken[row.lane]
            self.at[row.lane] = row.next
            self.recorded += row.recorded
        assert self.recorded == sum(row[1] for row in self.kernel.seen)
        self.lanes_of_last = [row.lane for row in ledger.lanes]
        self.told.update(ledger.lost)
        self.told_filtered.update(ledger.filtered)
        for index, cause in enumerate(NUMBERED_CAUSES):
            assert self.told[cause] <= sum(lane[index] for lane in self.kernel.lost), "no loss is told twice"

    @invariant()
    def nothing_is_settled_before_its_time(self) -> None:
        """What waits in the ring, or is being written, is not told yet."""
        if hasattr(self, "kernel"):
            for lane in range(LANES):
                waiting = sum(1 for its_lane, _ in self.kernel.ring if its_lane == lane)
                assert self.at[lane] + waiting + len(self.kernel.open[lane]) <= self.kernel.taken[lane]

    def teardown(self) -> None:
        """The end: programs end, the ring is drained, the last ledger settles everything, by its true cause."""
        for lane in range(LANES):
            while self.kernel.open[lane]:
                self.kernel.finish(lane, 0, None)
        self.kernel.drain(10**6)
        counters = self.kernel.counters()
        self.settle(counters, counters, counters, emptied=True, last=True)
        assert self.kernel.taken == self.at
        assert [i for i in range(LANES) if self.at[i]] == self.lanes_of_last, "the last ledger names every lane"
        truth = {c: sum(lane[i] for lane in self.kernel.lost) for i, c in enumerate(NUMBERED_CAUSES)}
        truth["probe_missed"] = self.kernel.missed
        assert {cause: n for cause, n in truth.items() if n} == dict(self.told)
        filtered = {
            name: sum(lane[i] for lane in self.kernel.filtered)
            for i, name in enumerate(("kernel_target", "kernel_path", "kernel_network"))
        }
        assert {name: n for name, n in filtered.items() if n} == dict(self.told_filtered)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def settle(accountant: Accountant, kernel: Lanes, *, emptied: bool = True, last: bool = False) -> Ledger:
    """Settle with counters that stand still."""
    counters = kernel.counters()
    return accountant.settle(
        now_ns=1, lost_before=counters, taken_before=counters, after=counters, seen=kernel.seen_bytes(),
        emptied=emptied, missed=kernel.missed, last=last,
    )  # fmt: skip


def test_losses_behind_the_last_record_are_told_when_the_ring_is_empty() -> None:
    """A burst that ends in losses does not wait for the next event to be told."""
    kernel, accountant = Lanes(), Accountant(LANES)
    for number in range(10):
        kernel.take(0)
        kernel.finish(0, 0, None if number < 4 else 0)
    kernel.drain(2)
    assert [LaneRow(0, 0, 2, 2, 0, 0)] == settle(accountant, kernel, emptied=False).lanes
    kernel.drain(9)
    ledger = settle(accountant, kernel)
    assert ([LaneRow(0, 2, 10, 2, 0, 6)], {"ring_full": 6}) == (ledger.lanes, ledger.lost)
    assert [] == settle(accountant, kernel).lanes


def test_a_number_that_never_comes_is_lost_in_flight_at_the_end() -> None:
    """A program that was cut off took a number; the last ledger tells it beside the losses with a known cause."""
    kernel, accountant = Lanes(), Accountant(LANES)
    for lane in (0, UPROBE):
        kernel.take(lane)
        kernel.finish(lane, 0, None)
        kernel.take(lane)  # never ends
        kernel.open[lane].clear()
        for _ in range(3):
            kernel.take(lane)
            kernel.finish(lane, 0, 1)
    kernel.drain(9)
    ledger = settle(accountant, kernel, last=True)
    assert [LaneRow(0, 0, 5, 1, 0, 4), LaneRow(UPROBE, 0, 5, 1, 0, 4)] == ledger.lanes
    assert {"inflight": 2, "rate_limit": 6} == ledger.lost


@pytest.mark.parametrize("last", [False, True])
def test_contradictions_are_broken_promises(last: bool) -> None:
    """Numbers that go backwards, or more of them than were handed out, stop the books."""
    kernel = Lanes()
    kernel.seen[1][3] = 1
    with pytest.raises(BrokenPromise, match="backwards"):
        settle(Accountant(LANES), kernel, last=last)
    kernel = Lanes()
    kernel.take(2)
    kernel.seen[2] = [2, 2, 0, 0]
    with pytest.raises(BrokenPromise, match="handed out"):
        settle(Accountant(LANES), kernel, last=last)


def test_what_was_counted_while_nothing_was_recorded_is_told_with_the_next_batch() -> None:
    """Two ledgers join into one window with both counts; one with numbers cannot be put in front."""
    quiet = Ledger(1, 2, [], {"kernel_path": 3}, {"probe_missed": 1})
    busy = Ledger(2, 3, [LaneRow(0, 0, 1, 1, 0, 0)], {"kernel_path": 1, "kernel_target": 2}, {"probe_missed": 1})
    both = join(quiet, busy)
    assert Ledger(1, 3, busy.lanes, {"kernel_path": 4, "kernel_target": 2}, {"probe_missed": 2}) == both
    assert [] == ledger_faults(both)
    with pytest.raises(BrokenPromise):
        join(busy, quiet)
