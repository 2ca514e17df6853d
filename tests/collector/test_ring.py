"""The C reader against a ring made by hand: the kernel's layout in shared memory, every state a record can be in."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_collector.accounting import UPROBE_KIND
from stella_collector.ring import CRing
from stella_shared.errors import BrokenPromise
from stella_shared.kernel_records import RECORD_HEADER
from stella_shared.raw_batches import pack_batch, records, unpack_batch
from stella_shared.wire import LANE_KINDS

PAGE = mmap.PAGESIZE
SIZE = PAGE
LANES = 2 * LANE_KINDS
BUSY, DISCARD = 1 << 31, 1 << 30


class FakeRing:
    """The kernel's side of a ring: consumer page, producer page, and the data twice in a row."""

    def __init__(self, start: int = 0) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * SIZE)
        self.memory = mmap.mmap(self.fd, 0)
        self.produced = start
        struct.pack_into("<Q", self.memory, 0, start)
        struct.pack_into("<Q", self.memory, PAGE, start)
        self.reader = CRing(self.fd, SIZE, LANES)

    def _write(self, at: int, data: bytes) -> None:
        # What the kernel gets by mapping the pages twice is written twice here.
        for i, byte in enumerate(data):
            offset = (at + i) % SIZE
            self.memory[2 * PAGE + offset] = byte
            self.memory[2 * PAGE + SIZE + offset] = byte

    @property
    def consumed(self) -> int:
        return int(struct.unpack_from("<Q", self.memory)[0])

    def put(self, data: bytes, flags: int = 0, length: int | None = None) -> int | None:
        """Append one record; return where it stands, None when there is no room."""
        step = (len(data) + 8 + 7) & ~7
        if self.produced + step - self.consumed > SIZE:
            return None
        at = self.produced
        # The kernel leaves what stood there before behind a record that is no multiple of 8.
        self._write(at, struct.pack("<II", (len(data) if length is None else length) | flags, 0) + data)
        self._write(at + 8 + len(data), b"\xaa" * (step - 8 - len(data)))
        self.produced += step
        struct.pack_into("<Q", self.memory, PAGE, self.produced)
        return at

    def submit(self, at: int, length: int, flags: int = 0) -> None:
        """Finish a record that was busy."""
        self._write(at, struct.pack("<I", length | flags))

    def close(self) -> None:
        self.reader.close()
        self.memory.close()
        os.close(self.fd)


def record(seq: int, lane: int = 0, body: bytes = b"", size: int | None = None) -> bytes:
    """Return a kernel record whose body says which one it is."""
    whole = RECORD_HEADER.size + len(body)
    return RECORD_HEADER.pack(seq + 1, seq, 7, 8, 9, 1, 1, 0, lane, 1, 0, whole if size is None else size, b"x") + body


@pytest.fixture
def ring() -> Iterator[FakeRing]:
    made = FakeRing()
    yield made
    made.close()


def test_what_stood_in_the_ring_before_is_never_told(ring: FakeRing) -> None:
    """A record of 67 bytes is followed by zeros whatever the ring held there, so that equal events are equal."""
    ring.put(record(0, body=b"abc"))
    ring.put(record(1, body=b"12345678"))
    ring.put(record(2, body=b"abc"))
    drained = ring.reader.drain(1 << 16)
    assert (3, 0, 1, 3) == (drained.count, drained.left, drained.first_ts_ns, drained.last_ts_ns)
    assert [b"abc\0\0\0\0\0", b"12345678", b"abc\0\0\0\0\0"] == [r.body for r in records(drained.records)]
    assert 2 == len(unpack_batch(drained.records).whats)
    assert ring.produced == ring.consumed


def test_a_busy_record_holds_back_what_follows(ring: FakeRing) -> None:
    """The reader stops at a record that is being written, and goes on when it is submitted."""
    ring.put(record(0))
    at = ring.put(record(1), flags=BUSY)
    ring.put(record(2))
    first = ring.reader.drain(1 << 16)
    assert 1 == first.count
    assert 2 * (RECORD_HEADER.size + 8) == first.left == ring.reader.waiting()
    assert at is not None
    ring.submit(at, RECORD_HEADER.size)
    assert [1, 2] == [r.seq for r in records(ring.reader.drain(1 << 16).records)]


def test_what_is_kept_can_be_read_again_by_another_reader(ring: FakeRing) -> None:
    """Room is given back when it is released, not when it is read; lanes go on where the first reader left them."""
    ring.reader.keep()
    ends = [0]
    batches = []
    for numbers in ((0, 1), (3, 4), (5,)):
        for seq in numbers:
            ring.put(record(seq))
        batches.append(ring.reader.drain(1 << 16).records)
        ends.append(ring.reader.position)
    assert (0, ends[-1], 0) == (ring.consumed, ring.reader.used(), ring.reader.waiting())
    ring.reader.release(ends[1])
    assert ends[1] == ring.consumed == ring.reader.released
    seen = ring.reader.seen()
    ring.put(record(6))
    other = CRing(ring.fd, SIZE, LANES)
    other.keep()
    assert [3, 4] == [r.seq for r in records(other.again(ends[1], ends[2]).records)]
    assert list(records(batches[2])) == list(records(other.again(ends[2], ends[3]).records))
    other.resume(ends[3], seen)
    assert [6] == [r.seq for r in records(other.drain(1 << 16).records)]
    assert (7, 6, 1, 0) == struct.unpack_from("<4Q", other.seen())
    assert ends[1] == ring.consumed
    other.close()


def test_discarded_records_leave_no_trace(ring: FakeRing) -> None:
    """A discarded record is passed over, whatever stands in it; it counts in no lane."""
    ring.put(b"\xff" * 100, flags=DISCARD)
    ring.put(record(0))
    drained = ring.reader.drain(1 << 16)
    assert (1, 0) == (drained.count, drained.left)
    assert (1, 1, 0, 0) == struct.unpack_from("<4Q", ring.reader.seen())


def test_capacity_leaves_the_rest_for_the_next_drain(ring: FakeRing) -> None:
    """What does not fit is neither cut nor dropped."""
    for seq in range(5):
        ring.put(record(seq, body=b"x" * 8))
    step = 8 + RECORD_HEADER.size + 8
    assert [0, 1] == [r.seq for r in records(ring.reader.drain(2 * step + step - 1).records)]
    assert 0 == ring.reader.drain(step - 1).count
    assert [2, 3, 4] == [r.seq for r in records(ring.reader.drain(3 * step).records)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\1" * 63, id="shorter than a header"),
        pytest.param(record(0, size=RECORD_HEADER.size + 1), id="claims more than it has"),
        pytest.param(record(0, lane=LANES), id="a lane that does not exist"),
    ],
)
def test_a_record_that_cannot_be_is_a_broken_promise(ring: FakeRing, data: bytes) -> None:
    """The drain says so and does not stay there for ever."""
    ring.put(data)
    with pytest.raises(BrokenPromise, match="impossible size or lane"):
        ring.reader.drain(1 << 16)
    assert 0 == ring.reader.waiting()


@pytest.mark.parametrize("length", [SIZE, 2 * SIZE, (1 << 30) - 1])
@pytest.mark.parametrize("flags", [0, DISCARD])
def test_a_length_beyond_the_ring_is_a_broken_promise(ring: FakeRing, length: int, flags: int) -> None:
    """A length that runs over what was produced is never followed, neither by a copy nor by the position."""
    ring.put(record(0), length=length, flags=flags)
    with pytest.raises(BrokenPromise):
        ring.reader.drain(1 << 16)
    assert 0 == ring.reader.waiting()


def test_gaps_and_disorder_are_seen_by_lane(ring: FakeRing) -> None:
    """Skipped numbers are gaps in a strict lane; a number that goes back is disorder; uprobe lanes have neither."""
    for seq in (0, 1, 4, 3):
        ring.put(record(seq, lane=LANE_KINDS + 1))
    for seq in (5, 2, 9):
        ring.put(record(seq, lane=UPROBE_KIND))
    ring.reader.drain(1 << 16)
    rows = list(struct.iter_unpack("<4Q", ring.reader.seen()))
    assert (5, 4, 2, 1) == rows[LANE_KINDS + 1]
    assert (0, 3, 0, 0) == rows[UPROBE_KIND]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, LANES - 1), st.binary(max_size=40)),
        st.tuples(st.just("discard"), st.just(0), st.binary(max_size=120)),
        st.tuples(st.just("busy"), st.integers(0, LANES - 1), st.binary(max_size=40)),
        st.tuples(st.just("finish"), st.booleans(), st.just(b"")),
        st.tuples(st.just("lose"), st.integers(0, LANES - 1), st.just(b"")),
        st.tuples(st.just("drain"), st.integers(0, 2 * SIZE), st.just(b"")),
    ),
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, start=st.sampled_from([0, SIZE - 8, 5 * SIZE - 64, 2**40]))
def test_whatever_happens_every_record_comes_out_once_and_in_order(steps: list[tuple], start: int) -> None:
    """Busy and discarded records, wrap-around, full ring, any capacity: out comes what went in."""
    ring = FakeRing(start)
    try:
        got: list[tuple[int, int, bytes]] = []
        batches: list[tuple[list[tuple[int, int, bytes]], bytes]] = []
        numbers = [0] * LANES
        held: tuple[int, int, tuple[int, int, bytes]] | None = None
        order: list[tuple[int, int, bytes] | None] = []

        def take(capacity: int) -> None:
            before = ring.consumed
            drained = ring.reader.drain(capacity)
            assert drained.count * (8 + RECORD_HEADER.size) <= min(capacity, ring.consumed - before)
            assert drained.left == ring.produced - ring.consumed
            mine = [(r.lane, r.seq, r.body) for r in records(drained.records)]
            got.extend(mine)
            batches.append((mine, drained.records))

        for word, value, body in steps:
            if word == "drain":
                take(int(value))
            elif word == "lose":
                numbers[value] += 1
            elif word == "discard":
                ring.put(body, flags=DISCARD)
            elif word == "finish" and held is not None:
                at, length, what = held
                ring.submit(at, length, 0 if value else DISCARD)
                held = None
                if not value:
                    order[order.index(what)] = None
            elif word in ("put", "busy") and not (word == "busy" and held):
                if held is not None and held[2][0] == value:
                    continue  # one writer of a lane at a time
                raw = record(numbers[value], lane=int(value), body=body)
                at = ring.put(raw, flags=BUSY if word == "busy" else 0)
                what = (int(value), numbers[value], body + b"\0" * (-len(raw) % 8))
                numbers[value] += 1
                if at is None:
                    continue
                order.append(what)
                if word == "busy":
                    held = (at, len(raw), what)
        if held is not None:
            ring.submit(held[0], held[1])
        take(1 << 20)
        expected = [what for what in order if what is not None]
        assert expected == got
        assert pack_batch(record(seq, lane, body) for lane, seq, body in batches[-1][0]) == batches[-1][1]
        for lane, (following, delivered, skipped, disorder) in enumerate(struct.iter_unpack("<4Q", ring.reader.seen())):
            mine = [seq for its_lane, seq, _ in expected if its_lane == lane]
            assert delivered == len(mine)
            if lane % LANE_KINDS != UPROBE_KIND:
                assert 0 == disorder
                assert following == (mine[-1] + 1 if mine else 0)
                assert skipped == following - len(mine)
    finally:
        ring.close()
