"""The journal: whenever its writer is killed, what stands in the memory is one whole state and its batches."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_collector import journal
from stella_collector.journal import Journal, size_of
from stella_shared.errors import BrokenPromise
from stella_shared.wire import LaneRow, Ledger

BOOKS = 96


class Life:
    """A journal, and what its reader should find."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, size_of(BOOKS))
        self.journal = Journal(self.memory, BOOKS)
        self.journal.begin(0, books(0, 64), books(0, 32))
        self.written: dict[int, tuple[int, int, Ledger, bytes]] = {}

    def write(self, rows: int, size: int, coverage: bytes = b"") -> None:
        start, number = self.journal.position, self.journal.number
        ledger = Ledger(start, start + size, [LaneRow(lane, 0, 9, 9, 0, 0) for lane in range(rows)], {}, {})
        told = self.journal.write(
            start + size, ledger, coverage, books(number + 1, 64), books(number + 1, 32), final=rows == 3
        )
        assert number == told
        self.written[number] = start, start + size, ledger, coverage

    def killed(self, released: int = 0) -> journal.Recovered:
        """Return what another process finds."""
        copy = mmap.mmap(-1, size_of(BOOKS))
        copy[:] = self.memory[:]
        found = Journal(copy, BOOKS).recover(64, released)
        assert found is not None
        return found


def books(number: int, size: int) -> bytes:
    return bytes([number % 256]) * size


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2000), st.integers(0, 5000)),
        st.tuples(st.just("ack"), st.integers(0, 20), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_a_reader_finds_the_last_state_and_the_batches_that_nobody_stored(steps: list[Any]) -> None:
    """In whatever order acks come, and however often the log runs around."""
    life = Life()
    acked: set[int] = set()
    for step, a, b in steps:
        if step == "write":
            life.write(a, b)
        elif waiting := sorted(set(life.written) - acked):
            number = waiting[min(a, len(waiting) - 1)]
            life.journal.acked(number)
            acked.add(number)
        found = life.killed()
        assert (life.journal.number, life.journal.position) == (found.number, found.position)
        assert (books(found.number, 64), books(found.number, 32)) == (found.accountant, found.seen)
        told = {n: (w.start, w.end, w.ledger, w.coverage) for n, w in found.batches}
        kept = {n: w for n, w in life.written.items() if n not in acked and n >= min(told, default=1 << 60)}
        assert kept == told, "a tail of what was written, and none of it missing"
        first = min(set(life.written) - acked, default=None)
        if first is not None and first in told:
            assert life.journal.releasable() <= life.written[first][0]
        else:
            assert life.journal.releasable() <= life.journal.position


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 40), st.booleans())
def test_a_write_that_was_cut_short_leaves_the_state_before_it(cut: int, rows: int, last_bytes: bool) -> None:
    """Killed after any number of bytes of a batch: the reader has it whole, or not at all."""
    life = Life()
    life.write(2, 100)
    before = bytes(life.memory[:])
    life.write(rows, 100)
    after = bytes(life.memory[:])
    log = 2 * (len(before) - journal.LOG_BYTES) // 2
    # In the order of writing: the entry in the log, then the slot's data, then its head.
    order = [at for at in range(log, log + 4096) if before[at] != after[at]]
    slot = [at for at in range(log) if before[at] != after[at]]
    begin = slot[0] // (log // 2) * (log // 2)
    order += [at for at in slot if at >= begin + 8] + [at for at in slot if at < begin + 8]
    done = order[: len(order) - min(cut, len(order))] if last_bytes else order[:cut]
    torn = bytearray(before)
    for at in done:
        torn[at] = after[at]
    life.memory[:] = bytes(torn)
    found = life.killed()
    assert ([0, 1] if len(done) == len(order) else [0]) == [number for number, _ in found.batches]
    assert 1 + (len(done) == len(order)) == found.number


def test_what_keeps_too_much_of_the_ring_is_let_go_oldest_first() -> None:
    """Half of the ring at the most, less when it is nearly full; an ack that comes later is no harm."""
    life = Life()
    for _ in range(8):
        life.write(1, 100)
    life.journal.give_up(1600, 900)
    assert (0, 0) == (life.journal.releasable(), life.journal.let_go)
    life.journal.give_up(1000, 900)
    assert (300, 3) == (life.journal.releasable(), life.journal.let_go)
    life.journal.acked(7)
    assert 300 == life.journal.releasable()
    life.journal.acked(3)
    assert 400 == life.journal.releasable()
    found = life.killed(released=400)
    assert [0, 1, 2, 4, 5, 6] == [number for number, _ in found.batches]


def test_a_log_that_runs_over_forgets_the_oldest_and_keeps_no_ring_for_them() -> None:
    """With a bus that takes nothing: the newest entries stay, and the position moves past those that are gone."""
    life = Life()
    for _ in range(60):
        life.write(2000, 10, b"x" * 50_000)
    found = life.killed()
    numbers = [number for number, _ in found.batches]
    assert list(range(numbers[0], 60)) == numbers
    assert 0 < numbers[0] < 50
    assert life.written[numbers[0]][0] <= life.journal.releasable()
    assert numbers[0] == life.journal.let_go


def test_a_ledger_that_the_log_cannot_hold_is_a_broken_promise() -> None:
    """It would write over itself."""
    with pytest.raises(BrokenPromise, match="ledger takes"):
        Life().write(200_000, 10)


def test_memory_that_nobody_has_written_holds_nothing() -> None:
    """A run that was killed before it began."""
    assert None is Journal(mmap.mmap(-1, size_of(BOOKS)), BOOKS).recover(64, 0)
