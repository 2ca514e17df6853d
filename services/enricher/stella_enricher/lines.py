"""From a raw batch to canonical evidence lines.  Pure.

Most events repeat: the same program opens the same file from the same container.  So the costly parts of a
line are rendered once for each distinct thing and kept: the event with its thread name by the record's own
bytes, the container's fields by cgroup id.  What is left for each event is two look-ups and some numbers.

`CLines` does that part in C (`lines.c`, some 0.2 µs an event); `PythonLines` is the same in Python, six times
dearer, for an install without a compiler.  Both pass the same tests, which hold them to the slow and obvious
way: decode, `events.EvidenceLine`, sort.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Final

import msgspec

from stella_enricher.containers import Container
from stella_shared.errors import BrokenPromise
from stella_shared.events import (
    CALL_SOURCES,
    RECORD_HEADER,
    TYPE_NAMES,
    FileOpen,
    TcpState,
    decode_event,
    text,
)
from stella_shared.patterns import PathFilter
from stella_shared.wire import LANE_KINDS, LaneRow, Ledger, RawBatch

log = logging.getLogger(__name__)

NATIVE: Final = Path(__file__).parent / "native" / "lines.so"
#: Distinct events that are kept; beyond it the table starts anew.
FRAGMENTS_MAX: Final = 65_536
PLACES_LOG2: Final = 12
CPUS_MAX: Final = 8192
CGROUPS_MAX: Final = 256
_COMM_AT: Final = 48
_HEADER: Final = RECORD_HEADER.size
_json = msgspec.json.Encoder(order="sorted").encode
#: What `stella_lines_run` answers, and the C side's own limits.
_DONE, _NEED_EVENT, _NEED_PLACE, _MALFORMED, _NO_MEMORY = 0, 1, 2, -1, -2


class Part(msgspec.Struct, frozen=True):
    """The lines of one event type of a batch."""

    type: str
    lines: int
    body: bytes


class Enriched(msgspec.Struct, frozen=True):
    """A batch, enriched: its parts in the order of their types, and its ledger with our own filters in it."""

    parts: list[Part]
    ledger: Ledger


class _Fragment(msgspec.Struct, frozen=True, gc=False):
    """What is the same in every line of one distinct event.  `type` 0: the filters drop it."""

    type: int
    comm: str
    event: str
    source: str
    anonymous: bool


class _Place(msgspec.Struct, frozen=True, gc=False):
    """What is the same in every line of one cgroup."""

    before: str
    between: str
    after: str


class Lines(ABC):
    """Builds lines, keeping rendered parts from batch to batch.  Use `open_lines`; one for each enricher."""

    def __init__(self, paths: PathFilter) -> None:
        self._paths = paths
        self._rendered: tuple[str, str, list[str]] = ("", "", [])

    def build(self, batch: RawBatch, container_of: Callable[[int], Container]) -> Enriched:
        """Return the batch's lines.  Raises `BrokenPromise` when its bytes cannot be records."""
        key = (batch.node, batch.boot_id, batch.libraries)
        if key != self._rendered:
            # Another node's or boot's fields, or other library indexes, would be wrong in kept parts.
            self._rendered = key
            self._forget()
        parts, counted, filtered = self._put_together(batch, container_of)
        return Enriched(parts, _ledger(batch.ledger, counted, filtered))

    @abstractmethod
    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int]]:
        """Return the parts, and how many records were counted and filtered in each lane."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop every kept part."""

    @abstractmethod
    def cgroups(self, records: bytes) -> set[int]:
        """Return the distinct cgroup ids of a batch, or of its start when they are very many."""

    def _fragment(self, batch: RawBatch, at: int) -> tuple[_Fragment, int, bytes]:
        """Render the record at `at`; return that, its call, and the bytes it is known by."""
        fields = RECORD_HEADER.unpack_from(batch.records, at)
        kind, call, size = fields[7], fields[8], fields[9]
        record = batch.records[at : at + size]
        if call >= len(CALL_SOURCES):
            raise BrokenPromise(f"a record of unknown call {call}")
        event = decode_event(kind, call, record[_HEADER:], batch.libraries)
        wanted = not isinstance(event, FileOpen) or event.path is None or self._paths.decide(event.path)
        comm = text(record[_COMM_AT:_HEADER].split(b"\0", 1)[0])
        fragment = _Fragment(
            type=kind if wanted else 0,
            comm=f'"comm":{_text(comm)},',
            event=f'"event":{_json(event).decode()},' if wanted else "",
            source=f'"src":{_text(CALL_SOURCES[call])},',
            anonymous=isinstance(event, TcpState) and event.attribution == "none",
        )
        return fragment, call, record[_COMM_AT:]


def _place(boot_id: str, cgroup: int, container: Container) -> _Place:
    between = ""
    after = ""
    if container.container_id:
        between = f'"container_id":{_text(container.container_id)},'
        if container.container_id.startswith("unknown:"):
            between += f'"container_reason":{_text(container.reason)},'
        if container.image_digest:
            after = f'"image_digest":{_text(container.image_digest)},'
            if container.image_digest_kind:
                after += f'"image_digest_kind":{_text(container.image_digest_kind)},'
        elif container.image_reason:
            after = f'"image_reason":{_text(container.image_reason)},'
    return _Place(f'{{"boot_id":{_text(boot_id)},"cgroup_id":{cgroup},', between, after)


def _text(value: str) -> str:
    return _json(value).decode()


def _ledger(ledger: Ledger, counted: dict[int, int], filtered: dict[int, int]) -> Ledger:
    told = {row.lane: row.recorded for row in ledger.lanes if row.recorded}
    if told != counted:
        raise BrokenPromise(f"the batch's ledger speaks of records {told}, but it holds {counted}")
    if not filtered:
        return ledger
    rows = [
        LaneRow(r.lane, r.first, r.next, r.recorded - n, r.filtered + n, r.lost)
        for r in ledger.lanes
        for n in (filtered.get(r.lane, 0),)
    ]
    causes = {**ledger.filtered, "user_path": ledger.filtered.get("user_path", 0) + sum(filtered.values())}
    return Ledger(ledger.start_ns, ledger.end_ns, rows, causes, ledger.lost)


class PythonLines(Lines):
    """The loop in Python."""

    def __init__(self, paths: PathFilter) -> None:
        super().__init__(paths)
        self._fragments: list[dict[bytes, _Fragment]] = [{} for _ in CALL_SOURCES]

    def _forget(self) -> None:
        for table in self._fragments:
            table.clear()

    def cgroups(self, records: bytes) -> set[int]:
        found: set[int] = set()
        at, end = 0, len(records)
        while at + _HEADER <= end:
            fields = RECORD_HEADER.unpack_from(records, at)
            if fields[9] < _HEADER:
                break
            found.add(fields[2])
            at += fields[9]
        return found

    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int]]:
        out: dict[int, list[str]] = {}
        counted: dict[int, int] = {}
        filtered: dict[int, int] = {}
        places: dict[int, _Place] = {}
        data = batch.records
        at, end = 0, len(data)
        node = f'"node":{_text(batch.node)},'
        run = f'"run":{_text(batch.run)},'
        while at < end:
            if end - at < _HEADER:
                raise BrokenPromise(f"{end - at} bytes are left over")
            ts, seq, cgroup, tgid, tid, uid, lane, _, call, size, _ = RECORD_HEADER.unpack_from(data, at)
            if size < _HEADER or size % 8 or size > end - at or lane >= CPUS_MAX * LANE_KINDS:
                raise BrokenPromise(f"a record at {at} of {end} claims {size} bytes in lane {lane}")
            fragment = self._fragments[call].get(data[at + _COMM_AT : at + size]) if call < len(CALL_SOURCES) else None
            if fragment is None:
                fragment, call, key = self._fragment(batch, at)
                table = self._fragments[call]
                if len(table) >= FRAGMENTS_MAX:
                    table.clear()
                table[key] = fragment
            at += size
            counted[lane] = counted.get(lane, 0) + 1
            if not fragment.type:
                filtered[lane] = filtered.get(lane, 0) + 1
                continue
            place = places.get(cgroup)
            if place is None:
                place = places[cgroup] = _place(batch.boot_id, cgroup, container_of(cgroup))
            comm, pid, thread, user = fragment.comm, f'"pid":{tgid},', f'"tid":{tid},', f',"uid":{uid}'
            if fragment.anonymous:
                comm = pid = thread = user = ""
            out.setdefault(fragment.type, []).append(
                f'{place.before}{comm}{place.between}{fragment.event}{place.after}"lane":{lane},{node}{pid}{run}'
                f'"seq":{seq},{fragment.source}{thread}"ts_ns":{ts}{user}}}\n'
            )
        parts = [Part(TYPE_NAMES[kind], len(out[kind]), "".join(out[kind]).encode()) for kind in sorted(out)]
        return parts, counted, filtered


class CLines(Lines):
    """The loop in C."""

    def __init__(self, paths: PathFilter) -> None:
        super().__init__(paths)
        lib = ctypes.CDLL(str(NATIVE))
        lib.stella_lines_new.restype = c_void_p
        lib.stella_lines_new.argtypes = (c_uint32, c_uint32, c_uint32, c_uint64)
        lib.stella_lines_free.argtypes = (c_void_p,)
        lib.stella_lines_forget.argtypes = (c_void_p,)
        lib.stella_lines_begin.argtypes = (c_void_p, c_char_p, c_uint32, c_char_p, c_uint32)
        lib.stella_lines_run.restype = c_int
        lib.stella_lines_run.argtypes = (c_void_p, c_char_p, c_uint64, POINTER(c_uint64))
        lib.stella_lines_add_event.restype = c_int
        lib.stella_lines_add_event.argtypes = (
            c_void_p, c_uint16, c_char_p, c_uint32, c_uint8, c_uint8,
            c_char_p, c_uint32, c_char_p, c_uint32, c_char_p, c_uint32,
        )  # fmt: skip
        lib.stella_lines_add_place.restype = c_int
        lib.stella_lines_add_place.argtypes = (
            c_void_p, c_uint64, c_char_p, c_uint32, c_char_p, c_uint32, c_char_p, c_uint32,
        )  # fmt: skip
        lib.stella_lines_output.restype = c_void_p
        lib.stella_lines_output.argtypes = (c_void_p, c_uint32, POINTER(c_uint64), POINTER(c_uint64))
        lib.stella_lines_counts.restype = POINTER(c_uint64)
        lib.stella_lines_counts.argtypes = (c_void_p, c_int)
        lib.stella_lines_cgroups.restype = c_uint32
        lib.stella_lines_cgroups.argtypes = (c_char_p, c_uint64, c_void_p, c_uint32)
        self._lib = lib
        self._ids = (c_uint64 * CGROUPS_MAX)()
        self._lanes = CPUS_MAX * LANE_KINDS
        # Twice the slots, so that probing stays short.
        self._table = lib.stella_lines_new(FRAGMENTS_MAX.bit_length(), PLACES_LOG2, self._lanes, secrets.randbits(64))
        if not self._table:
            raise MemoryError("no memory for the table of events")

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self._lib.stella_lines_free(self._table)
            self._table = None

    def _forget(self) -> None:
        self._lib.stella_lines_forget(self._table)

    def cgroups(self, records: bytes) -> set[int]:
        found = self._lib.stella_lines_cgroups(records, len(records), self._ids, CGROUPS_MAX)
        return set(self._ids[:found])

    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int]]:
        lib, table, data = self._lib, self._table, batch.records
        node = f'"node":{_text(batch.node)},'.encode()
        run = f'"run":{_text(batch.run)},'.encode()
        if lib.stella_lines_begin(table, node, len(node), run, len(run)):
            raise MemoryError("no memory for a batch")
        position = c_uint64(0)
        while (answer := lib.stella_lines_run(table, data, len(data), byref(position))) != _DONE:
            at = position.value
            if answer == _NEED_EVENT:
                fragment, call, key = self._fragment(batch, at)
                comm, event, source = fragment.comm.encode(), fragment.event.encode(), fragment.source.encode()
                answer = lib.stella_lines_add_event(
                    table, call, key, len(key), fragment.type, fragment.anonymous,
                    comm, len(comm), event, len(event), source, len(source),
                )  # fmt: skip
            elif answer == _NEED_PLACE:
                cgroup = RECORD_HEADER.unpack_from(data, at)[2]
                place = _place(batch.boot_id, cgroup, container_of(cgroup))
                before, between, after = place.before.encode(), place.between.encode(), place.after.encode()
                answer = lib.stella_lines_add_place(
                    table, cgroup, before, len(before), between, len(between), after, len(after)
                )
            if answer == _NO_MEMORY:
                raise MemoryError("no memory for a batch")
            if answer == _MALFORMED:
                raise BrokenPromise(f"a record at {at} of {len(data)} cannot be one")
        parts = []
        length, lines = c_uint64(), c_uint64()
        for kind, name in TYPE_NAMES.items():
            at_text = lib.stella_lines_output(table, kind, byref(length), byref(lines))
            if lines.value:
                parts.append(Part(name, lines.value, ctypes.string_at(at_text, length.value)))
        counted, filtered = lib.stella_lines_counts(table, 0), lib.stella_lines_counts(table, 1)
        lanes = [row.lane for row in batch.ledger.lanes if row.lane < self._lanes]
        found = {lane: counted[lane] for lane in lanes if counted[lane]}
        dropped = {lane: filtered[lane] for lane in lanes if filtered[lane]}
        if sum(found.values()) != counted[self._lanes]:
            raise BrokenPromise("the batch holds records of lanes that its ledger does not name")
        return parts, found, dropped


def open_lines(paths: PathFilter) -> Lines:
    """Return the best builder there is."""
    if NATIVE.exists():
        return CLines(paths)
    log.warning("the C line builder is not built; building lines in Python, which costs more")
    return PythonLines(paths)


def all_lost(ledger: Ledger) -> Ledger:
    """Return the ledger of a batch whose records cannot be used: what they were is lost, by the enricher."""
    rows = [LaneRow(r.lane, r.first, r.next, 0, r.filtered, r.lost + r.recorded) for r in ledger.lanes]
    gone = sum(r.recorded for r in ledger.lanes)
    lost = {**ledger.lost, "enricher": ledger.lost.get("enricher", 0) + gone} if gone else ledger.lost
    return Ledger(ledger.start_ns, ledger.end_ns, rows, ledger.filtered, lost)
