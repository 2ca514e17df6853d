"""What a collector knows and the ring does not: in memory of the kernel's, where it outlives the process.

    read from the ring ─> write() ─> published ─> acked() ─> the ring's room is given back

Records stay in the ring until the batch that holds them is stored on the bus; the journal has what else the batch is
made of: its number, where its records lie, its ledger.  Whoever comes after a killed collector reads the same bytes
once more, makes the same batch under the same number, and goes on with the books that the journal has (`recover`).

The memory is a state in two slots, then a log of batches that are on their way:

    slot    u32 crc, u32 length, then u64 sequence, position, next number, tail, head of the log, and the books
    log     entries of `_ENTRY`: u32 length, u32 crc, u64 number, u64 stored, then MessagePack of `Written`

Slots are written in turn, an entry before the slot that counts it in.  So a write that was cut short leaves the state
before it whole.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections import deque
from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.wire import Ledger

#: Of a batch: room for a ledger of some hundred lanes and for a coverage document.
LOG_BYTES: Final = 2 << 20
COVERAGE_BYTES_MAX: Final = 256 << 10
#: Batches that are read and not stored keep at most this share of the ring, and less once so much of it is in use:
#: beyond it the oldest ones are in the process's memory alone.
KEPT_SHARE: Final = 0.5
USED_SHARE: Final = 0.75
_KEPT_SHARE_WHEN_FULL: Final = 0.125
_SLOT: Final = struct.Struct("<II")
_STATE: Final = struct.Struct("<5Q")
_ENTRY: Final = struct.Struct("<IIQQ")
_STORED_AT: Final = 16
#: Entries begin at multiples of it, so that room for a head is left at the end of the log, or none.
_ALIGN: Final = 32
#: The number of an entry that fills the log up to its end.
_FILLER: Final = (1 << 64) - 1


class Written(msgspec.Struct, frozen=True, array_like=True):
    """What is written of a batch: its records are what the ring holds in `[start, end)`."""

    start: int
    end: int
    ledger: Ledger
    coverage: bytes
    final: bool


class Recovered(msgspec.Struct, frozen=True):
    """What a journal held: the batches that nobody has said to be stored, and how to go on behind them."""

    position: int
    number: int
    accountant: bytes
    seen: bytes
    batches: list[tuple[int, Written]]


class _Batch(msgspec.Struct):
    """A batch on its way."""

    number: int
    start: int
    end: int
    #: Where its entry is in the log, and where the next one begins.
    at: int
    behind: int
    stored: bool = False


def size_of(state_bytes: int) -> int:
    """Return the bytes of a journal for books of `state_bytes`."""
    return 2 * _slot_size(state_bytes) + LOG_BYTES


class Journal:
    """The journal in `memory`, which is zeros at first.  `state_bytes` is the size of the books."""

    def __init__(self, memory: mmap.mmap, state_bytes: int) -> None:
        self._memory = memory
        self._state_bytes = state_bytes
        self._slot = _slot_size(state_bytes)
        self._sequence = 0
        self._tail = self._head = 0
        self._books = (b"", b"")
        #: Where reading goes on, and the number of the next batch.
        self.position = self.number = 0
        #: Those in the log, and those of them whose records the ring still keeps.
        self._log: deque[_Batch] = deque()
        self._kept: deque[_Batch] = deque()
        self._by_number: dict[int, _Batch] = {}
        #: Batches that were given up to the process's memory.
        self.let_go = 0

    # ---- writing

    def begin(self, position: int, accountant: bytes, seen: bytes) -> None:
        """Start at `position` with these books."""
        self.position, self._books = position, (accountant, seen)
        self._write_state()

    def write(
        self, end: int, ledger: Ledger, coverage: bytes, accountant: bytes, seen: bytes, *, final: bool = False
    ) -> int:
        """Put down the batch of all that was read up to `end`, and the books behind it; return its number."""
        number = self.number
        if len(coverage) > COVERAGE_BYTES_MAX:
            coverage = b""
        data = msgspec.msgpack.encode(Written(self.position, end, ledger, coverage, final))
        length = -(-(_ENTRY.size + len(data)) // _ALIGN) * _ALIGN
        if length > LOG_BYTES // 2:
            raise BrokenPromise(f"a batch's ledger takes {len(data)} bytes")
        self._make_room(length)
        at = self._head % LOG_BYTES
        place = 2 * self._slot + at
        _ENTRY.pack_into(self._memory, place, len(data), zlib.crc32(data), number, 0)
        self._memory[place + _ENTRY.size : place + _ENTRY.size + len(data)] = data
        batch = _Batch(number, self.position, end, self._head, self._head + length)
        self._log.append(batch)
        self._kept.append(batch)
        self._by_number[number] = batch
        self._head += length
        self.position, self.number, self._books = end, number + 1, (accountant, seen)
        self._write_state()
        return number

    def acked(self, number: int) -> None:
        """Batch `number` is stored on the bus."""
        batch = self._by_number.pop(number, None)
        if batch is None:
            return
        batch.stored = True
        if batch.at >= self._tail:
            # One aligned word: whoever reads the journal sees it or does not.
            place = 2 * self._slot + batch.at % LOG_BYTES + _STORED_AT
            self._memory[place : place + 8] = b"\1" + bytes(7)
        while self._log and self._log[0].stored:
            self._tail = self._log.popleft().behind
        while self._kept and self._kept[0].stored:
            self._kept.popleft()

    def releasable(self) -> int:
        """Return the position before which nothing has to stay in the ring."""
        return self._kept[0].start if self._kept else self.position

    def give_up(self, size: int, used: int) -> None:
        """Let the oldest batches go where they keep too much of a ring of `size` bytes, `used` of which are in use."""
        while self._kept:
            kept = self.position - self._kept[0].start
            if kept <= (KEPT_SHARE if used <= USED_SHARE * size else _KEPT_SHARE_WHEN_FULL) * size:
                return
            batch = self._kept.popleft()
            used -= batch.end - batch.start
            self.let_go += not batch.stored

    def _make_room(self, length: int) -> None:
        """Have `length` bytes in a row at the head of the log; the oldest entries go where there is no room."""
        rest = LOG_BYTES - self._head % LOG_BYTES
        skip = rest if rest < length else 0
        lost = False
        while self._log and self._head + skip + length - self._tail > LOG_BYTES:
            self._tail = self._log.popleft().behind
            lost = True
        while self._kept and self._kept[0].at < self._tail:
            self.let_go += not self._kept.popleft().stored
        if lost:
            self._write_state()  # before it is written over: no state may count it in
        if skip:
            _ENTRY.pack_into(self._memory, 2 * self._slot + self._head % LOG_BYTES, 0, 0, _FILLER, 0)
            self._head += skip
        if not self._log:
            self._tail = self._head

    def _write_state(self) -> None:
        self._sequence += 1
        data = _STATE.pack(self._sequence, self.position, self.number, self._tail, self._head) + b"".join(self._books)
        at = self._sequence % 2 * self._slot
        self._memory[at + _SLOT.size : at + _SLOT.size + len(data)] = data
        _SLOT.pack_into(self._memory, at, zlib.crc32(data), len(data))

    # ---- reading what another process has written

    def recover(self, accountant_bytes: int, released: int) -> Recovered | None:
        """Take up what the memory holds; None when nothing whole was ever written.

        What lies before `released` is no longer in the ring.
        """
        states = [state for state in (self._read_state(0), self._read_state(1)) if state]
        if not states:
            return None
        data = max(states, key=lambda state: _STATE.unpack_from(state)[0])
        self._sequence, self.position, self.number, self._tail, self._head = _STATE.unpack_from(data)
        books = data[_STATE.size :]
        self._books = books[:accountant_bytes], books[accountant_bytes:]
        found: list[tuple[int, Written]] = []
        at = self._tail
        while at < self._head:
            place = 2 * self._slot + at % LOG_BYTES
            length, crc, number, stored = _ENTRY.unpack_from(self._memory, place)
            if number == _FILLER:
                at += LOG_BYTES - at % LOG_BYTES
                continue
            raw = self._memory[place + _ENTRY.size : place + _ENTRY.size + length]
            if zlib.crc32(raw) != crc:
                raise BrokenPromise(f"the journal of a run is damaged at batch {number}")
            written = msgspec.msgpack.decode(raw, type=Written)
            behind = at + -(-(_ENTRY.size + length) // _ALIGN) * _ALIGN
            batch = _Batch(number, written.start, written.end, at, behind, stored=bool(stored))
            self._log.append(batch)
            if not stored:
                self._by_number[number] = batch
                found.append((number, written))
                if written.start >= released:
                    self._kept.append(batch)
            at = behind
        return Recovered(self.position, self.number, *self._books, found)

    def _read_state(self, slot: int) -> bytes:
        at = slot * self._slot
        crc, length = _SLOT.unpack_from(self._memory, at)
        if length != _STATE.size + self._state_bytes:
            return b""
        data = self._memory[at + _SLOT.size : at + _SLOT.size + length]
        return data if zlib.crc32(data) == crc else b""

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()


def _slot_size(state_bytes: int) -> int:
    return -(-(_SLOT.size + _STATE.size + state_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
