"""Raw batches: the records of one drain, each distinct thing said once.

Most records repeat what others say, so a batch says each distinct thing once (ring.c does the same in C):

    u32 whos, u32 whats, u32 events, u32 bytes of whats
    whos    each: u64 cgroup_id, u64 start_ns, u64 program, u32 tgid, u32 tid, u32 uid, u32 lane
    whats   each: u16 type, u16 call, u32 stride, char comm[16], body, zeros up to 8 bytes
    events  each: u64 ts_ns, u64 seq, u32 who, u32 what

Little-endian; no records at all are no bytes at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.kernel_records import RECORD_HEADER

BATCH_COUNTS: Final = struct.Struct("<4I")
WHO: Final = struct.Struct("<QQQIIII")
WHAT: Final = struct.Struct("<HHI16s")
EVENT: Final = struct.Struct("<QQII")


class Record(msgspec.Struct, frozen=True, gc=False):
    """One kernel record, its header decoded.  `body` is what follows the header, padding included."""

    ts_ns: int
    seq: int
    cgroup_id: int
    start_ns: int
    program: int
    tgid: int
    tid: int
    uid: int
    lane: int
    type: int
    call: int
    comm: bytes
    body: bytes


class Batch(msgspec.Struct, frozen=True):
    """A batch taken apart: rows of `WHO`, whole whats with head and body, rows of `EVENT`."""

    whos: list[tuple[int, int, int, int, int, int, int]]
    whats: list[bytes]
    events: list[tuple[int, int, int, int]]


def pack_batch(raw: Iterable[bytes]) -> bytes:
    """Return the batch of kernel records as they come out of the ring, each with its header."""
    whos: dict[tuple[int, int, int, int, int, int, int], int] = {}
    whats: dict[bytes, int] = {}
    events = bytearray()
    count = 0
    for record in raw:
        ts, seq, *someone, kind, call, size, comm = RECORD_HEADER.unpack_from(record)
        body = record[RECORD_HEADER.size : size]
        stride = (WHAT.size + len(body) + 7) & ~7
        what = (WHAT.pack(kind, call, stride, comm) + body).ljust(stride, b"\0")
        who = whos.setdefault(tuple(someone), len(whos))
        events += EVENT.pack(ts, seq, who, whats.setdefault(what, len(whats)))
        count += 1
    if not count:
        return b""
    said = b"".join(whats)
    head = BATCH_COUNTS.pack(len(whos), len(whats), count, len(said))
    return b"".join([head, *(WHO.pack(*who) for who in whos), said, bytes(events)])


def unpack_batch(data: bytes) -> Batch:
    """Take a batch apart.  Raises `BrokenPromise` when it cannot be one."""
    if not data:
        return Batch([], [], [])
    if len(data) < BATCH_COUNTS.size:
        raise BrokenPromise(f"a batch of {len(data)} bytes")
    whos, whats, events, said = BATCH_COUNTS.unpack_from(data)
    begin = BATCH_COUNTS.size + whos * WHO.size
    end = begin + said
    if len(data) != end + events * EVENT.size:
        raise BrokenPromise(f"a batch of {len(data)} bytes should have {end + events * EVENT.size}")
    found: list[bytes] = []
    at = begin
    while at < end:
        stride = WHAT.unpack_from(data, at)[2] if end - at >= WHAT.size else 0
        if stride < WHAT.size or stride % 8 or stride > end - at:
            raise BrokenPromise(f"a what at {at} of {end} claims {stride} bytes")
        found.append(data[at : at + stride])
        at += stride
    rows = list(EVENT.iter_unpack(data[end:]))
    if len(found) != whats or any(who >= whos or what >= whats for _, _, who, what in rows):
        raise BrokenPromise("a batch speaks of things that it does not hold")
    return Batch(list(WHO.iter_unpack(data[BATCH_COUNTS.size : begin])), found, rows)


class Names(msgspec.Struct, frozen=True):
    """The distinct cgroup ids of a batch, and for each distinct program key a process: (pid, start_ns)."""

    cgroups: set[int]
    programs: dict[int, tuple[int, int]]


def names(data: bytes) -> Names:
    """Return what a batch needs names for, nothing for what is no batch."""
    if len(data) < BATCH_COUNTS.size:
        return Names(set(), {})
    whos = data[BATCH_COUNTS.size : BATCH_COUNTS.size + BATCH_COUNTS.unpack_from(data)[0] * WHO.size]
    rows = list(WHO.iter_unpack(whos[: len(whos) // WHO.size * WHO.size]))
    return Names({row[0] for row in rows}, {row[2]: (row[3], row[1]) for row in rows})


def oldest_ns(data: bytes) -> int:
    """Return the time of the first event of a batch, 0 for what is no batch."""
    if len(data) < BATCH_COUNTS.size + EVENT.size:
        return 0
    whos, _, _, said = BATCH_COUNTS.unpack_from(data)
    at = BATCH_COUNTS.size + whos * WHO.size + said
    return int(EVENT.unpack_from(data, at)[0]) if at + EVENT.size <= len(data) else 0


def records(data: bytes) -> Iterator[Record]:
    """Yield the records of a batch.  Raises `BrokenPromise` when it cannot be one."""
    batch = unpack_batch(data)
    heads = [WHAT.unpack_from(what) for what in batch.whats]
    for ts, seq, who, what in batch.events:
        kind, call, _, comm = heads[what]
        yield Record(
            ts, seq, *batch.whos[who], kind, call, comm.split(b"\0", 1)[0], batch.whats[what][WHAT.size :]
        )  # fmt: skip
