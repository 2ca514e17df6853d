"""The ring reader: drains in batches, never event by event.

`CRing` is `ring.c`, and what everybody should use.  `LibbpfRing` reads through libbpf's own callback where
no compiler was at install time: some fifteen times dearer per event, with the same results.  Both pass the
same tests; `open_ring` says in its log line which one it is.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import secrets
import struct
from ctypes import c_int, c_uint32, c_uint64, c_void_p
from typing import Final, Protocol

import msgspec

from stella_collector.libbpf import NATIVE, RING_CALLBACK, Libbpf
from stella_shared.errors import BrokenPromise
from stella_shared.kernel_records import RECORD_HEADER
from stella_shared.raw_batches import pack_batch
from stella_shared.wire import LANE_KINDS, UPROBE_KIND

log = logging.getLogger(__name__)

_LANE: Final = struct.Struct("<4Q")
#: Where `lane` and `size` stand among the fields of a header.
_LANE_INDEX: Final = 8
_SIZE: Final = 11
#: No record is larger: the largest, an exec's, has room for two names and two times argv behind its header.
RECORD_MAX_BYTES: Final = 8192


class Drained(msgspec.Struct, frozen=True):
    """What one drain brought.

    `records` is a batch (see `stella_shared.raw_batches`); `span` is the bytes of the ring that were read for it,
    `left` those that still wait.
    """

    records: bytes
    count: int
    span: int
    left: int
    first_ts_ns: int
    last_ts_ns: int


class Ring(Protocol):
    """A ring reader."""

    size: int
    #: Whether `keep` is possible.
    can_keep: bool

    def waiting(self) -> int:
        """Return the bytes that have not been read."""

    def used(self) -> int:
        """Return the bytes that the kernel cannot use: not read, or read and kept."""

    def drain(self, capacity: int) -> Drained:
        """Read what is there, up to `capacity` bytes.  Raises `BrokenPromise` on a record that cannot be."""

    def seen(self) -> bytes:
        """Return each lane's (next, delivered, gaps, disorder), four u64 a lane."""

    def close(self) -> None:
        """Let go of the ring's memory."""


class _Result(ctypes.Structure):
    # struct drained of ring.c
    _fields_ = [
        (name, c_uint64)
        for name in (
            "records",
            "bytes",
            "left",
            "first_ts_ns",
            "last_ts_ns",
            "whos",
            "whats",
            "what_bytes",
            "malformed",
            "span",
        )
    ]


class CRing:
    """The ring through `native/ring.so`.  One caller at a time; the drain runs without Python's lock."""

    def __init__(self, fd: int, size: int, lanes: int) -> None:
        self.can_keep = True
        self._keeps = False
        self._lib = ctypes.CDLL(str(NATIVE / "ring.so"))
        self._lib.stella_ring_open.restype = c_void_p
        self._lib.stella_ring_open.argtypes = (c_int, c_uint64, c_uint64)
        self._lib.stella_ring_close.argtypes = (c_void_p,)
        for name in ("waiting", "used", "position", "released"):
            function = getattr(self._lib, f"stella_ring_{name}")
            function.restype, function.argtypes = c_uint64, (c_void_p,)
        for name in ("seek", "release"):
            function = getattr(self._lib, f"stella_ring_{name}")
            function.restype, function.argtypes = None, (c_void_p, c_uint64)
        self._lib.stella_ring_drain.restype = None
        self._lib.stella_ring_drain.argtypes = (c_void_p, c_uint64, c_void_p, c_uint32, c_void_p)
        self._lib.stella_ring_batch.restype = None
        self._lib.stella_ring_batch.argtypes = (c_void_p, c_void_p, c_void_p)
        self.size = size
        self._count = lanes
        self._lanes = ctypes.create_string_buffer(lanes * _LANE.size)
        self._result = _Result()
        self._out = ctypes.create_string_buffer(1 << 16)
        self._ring = self._lib.stella_ring_open(fd, size, secrets.randbits(64))
        if not self._ring:
            raise BrokenPromise(f"a ring of {size} bytes cannot be mapped")

    def waiting(self) -> int:
        return int(self._lib.stella_ring_waiting(self._ring))

    def used(self) -> int:
        return int(self._lib.stella_ring_used(self._ring))

    def keep(self) -> None:
        """From now on, let what was read stay in the ring until it is released."""
        self._keeps = True

    @property
    def position(self) -> int:
        """Where reading goes on, in bytes since the ring was made."""
        return int(self._lib.stella_ring_position(self._ring))

    @property
    def released(self) -> int:
        """Before this position the kernel may have written anew."""
        return int(self._lib.stella_ring_released(self._ring))

    def release(self, position: int) -> None:
        """Give the kernel what lies before `position`, which has been read."""
        if self._ring:
            self._lib.stella_ring_release(self._ring, position)

    def resume(self, position: int, seen: bytes) -> None:
        """Go on at `position`, which has not been released, with the lanes as `seen` returned them there."""
        self._lib.stella_ring_seek(self._ring, position)
        ctypes.memmove(self._lanes, seen, len(self._lanes))

    def again(self, start: int, end: int) -> Drained:
        """Read once more what was read between two positions.  Lanes do not count it; reading goes on at `end`."""
        self._lib.stella_ring_seek(self._ring, start)
        drained = self._drain(end - start, ctypes.create_string_buffer(len(self._lanes)))
        self._lib.stella_ring_seek(self._ring, end)
        return drained

    def drain(self, capacity: int) -> Drained:
        drained = self._drain(capacity, self._lanes)
        if not self._keeps:
            self.release(self.position)
        return drained

    def _drain(self, capacity: int, lanes: ctypes.Array[ctypes.c_char]) -> Drained:
        result = self._result
        self._lib.stella_ring_drain(self._ring, capacity, lanes, self._count, ctypes.byref(result))
        if result.malformed:
            raise BrokenPromise(f"{result.malformed} records in the ring have an impossible size or lane")
        if len(self._out) < result.bytes:
            self._out = ctypes.create_string_buffer(2 * result.bytes)
        self._lib.stella_ring_batch(self._ring, ctypes.byref(result), self._out)
        data = ctypes.string_at(self._out, result.bytes)
        return Drained(data, result.records, result.span, result.left, result.first_ts_ns, result.last_ts_ns)

    def seen(self) -> bytes:
        return self._lanes.raw

    def close(self) -> None:
        if self._ring:
            self._lib.stella_ring_close(self._ring)
            self._ring = None


class LibbpfRing:
    """The ring through libbpf's callback, which is told to stop where the next record might not fit."""

    def __init__(self, lib: Libbpf, fd: int, size: int, lanes: int) -> None:
        self.size = size
        self.can_keep = False
        self._lib = lib
        self._lanes = [[0, 0, 0, 0] for _ in range(lanes)]
        self._taken: list[bytes] = []
        self._room = 0
        self._malformed = 0
        # libbpf's positions are its own; the pages are mapped once more just to see how full the ring is.
        self._consumer = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self._producer = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._callback = RING_CALLBACK(self._on_record)
        self._ring = lib.ring_buffer__new(fd, ctypes.cast(self._callback, c_void_p), None, None)
        if not self._ring:
            raise BrokenPromise(f"libbpf cannot open a ring of {size} bytes")

    def _on_record(self, _: int, data: int, size: int) -> int:
        record = ctypes.string_at(data, size)
        fields = RECORD_HEADER.unpack_from(record) if size >= RECORD_HEADER.size else None
        if fields is None or not RECORD_HEADER.size <= fields[_SIZE] <= size or fields[_LANE_INDEX] >= len(self._lanes):
            self._malformed += 1
            return 0
        lane = self._lanes[fields[_LANE_INDEX]]
        lane[1] += 1
        if fields[_LANE_INDEX] % LANE_KINDS != UPROBE_KIND:
            seq = fields[1]
            if seq < lane[0]:
                lane[3] += 1
            else:
                lane[2] += seq - lane[0]
                lane[0] = seq + 1
        self._taken.append(record)
        self._room -= size
        # A negative answer ends the round; this record counts as consumed.
        return 0 if self._room >= RECORD_MAX_BYTES else -1

    def waiting(self) -> int:
        consumed = struct.unpack_from("<Q", self._consumer)[0]
        return int(struct.unpack_from("<Q", self._producer)[0] - consumed)

    def used(self) -> int:
        return self.waiting()

    def drain(self, capacity: int) -> Drained:
        self._room = capacity
        if capacity >= RECORD_MAX_BYTES:
            self._lib.ring_buffer__consume(self._ring)
        if self._malformed:
            raise BrokenPromise(f"{self._malformed} records in the ring have an impossible size or lane")
        taken, self._taken = self._taken, []
        data = pack_batch(taken)
        first = struct.unpack_from("<Q", taken[0])[0] if taken else 0
        last = struct.unpack_from("<Q", taken[-1])[0] if taken else 0
        return Drained(data, len(taken), sum(map(len, taken)), self.waiting(), first, last)

    def seen(self) -> bytes:
        return b"".join(_LANE.pack(*lane) for lane in self._lanes)

    def close(self) -> None:
        if self._ring:
            self._lib.ring_buffer__free(self._ring)
            self._ring = None
            self._consumer.close()
            self._producer.close()


def can_keep() -> bool:
    """Return whether the reader that `open_ring` returns can leave records in the ring."""
    return (NATIVE / "ring.so").exists()


def open_ring(lib: Libbpf, fd: int, size: int, lanes: int) -> Ring:
    """Return the best reader there is for the ring behind `fd`."""
    if can_keep():
        return CRing(fd, size, lanes)
    log.warning("the C ring reader is not built; reading through libbpf's callback, which costs more")
    return LibbpfRing(lib, fd, size, lanes)
