"""From a raw batch to canonical evidence lines.  Pure.

Most events repeat: the same program opens the same file from the same container.  So the costly parts of a
line are rendered once for each distinct thing and kept: the event with its thread name by its own bytes (a
batch's *what*), container and program by cgroup id and program key.  What is left for each event is copying and
some numbers.

`CLines` does that part in C (`lines.c`, some 0.2 µs an event); `PythonLines` is the same in Python, six times
dearer, for an install without a compiler.  Both pass the same tests, which hold them to the slow and obvious
way: decode, `events.EvidenceLine`, sort.

The arguments of a program start are redacted when it is rendered, so neither loop ever has a secret to copy.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Final

import msgspec

from stella_enricher.containers import Container
from stella_enricher.frames import FrameNamer, WithStack
from stella_enricher.redaction import Redactor
from stella_enricher.remembering import SLOT_BYTES, text_bytes
from stella_enricher.runtimes.facts import Pod
from stella_shared import events
from stella_shared.errors import BrokenPromise
from stella_shared.events import FileOpen, FunctionCall, ProcessExec, TcpState, Throttle
from stella_shared.evidence import compressed
from stella_shared.kernel_records import CALL_SOURCES, TYPE_NAMES, decode_event, text
from stella_shared.patterns import PathFilter
from stella_shared.raw_batches import BATCH_COUNTS, WHAT, WHO, unpack_batch
from stella_shared.wire import FORGOTTEN_PROGRAM, LANE_KINDS, PROGRAM_NONE, LaneRow, Ledger, Program, RawBatch

log = logging.getLogger(__name__)

NATIVE: Final = Path(__file__).parent / "native" / "lines.so"
#: Distinct events that are kept; beyond it, and beyond their share of `max_cache_memory_mb`, the table starts anew.
FRAGMENTS_MAX: Final = 65_536
EVENTS_SHARE: Final = 0.25
PLACES_SHARE: Final = 0.0625
PLACES_LOG2: Final = 14
PLACES_MAX: Final = 8192
LANES_MAX: Final = 8192 * LANE_KINDS
_json = msgspec.json.Encoder(order="sorted").encode
#: What `stella_lines_run` answers, and the C side's own limits.
_DONE, _NEED_EVENT, _NEED_PLACE, _MALFORMED, _NO_MEMORY = 0, 1, 2, -1, -2


class Part(msgspec.Struct, frozen=True):
    """The lines of one event type of a batch, as a frame."""

    type: str
    lines: int
    frame: bytes


class Enriched(msgspec.Struct, frozen=True):
    """A batch, enriched: its parts in the order of their types, and its ledger with our own filters in it.

    `by_cgroup` says how many of the lines each cgroup has.
    """

    parts: list[Part]
    ledger: Ledger
    by_cgroup: dict[int, int] = {}


class _Fragment(msgspec.Struct, frozen=True, gc=False):
    """What is the same in every line of one distinct event.  `type` 0: the filters drop it."""

    type: int
    comm: str
    event: str
    source: str
    anonymous: bool


class _Place(msgspec.Struct, frozen=True, gc=False):
    """What is the same in every line of one program in one cgroup: texts, in the order in which they stand."""

    before: str
    between: str
    after: str
    late: str = ""


#: A `_Fragment` without the content of its strings.
_FRAGMENT_BYTES: Final = 120
#: A place without its texts: slot and key, `_Place`, the program that it was rendered from with its own texts.
_PLACE_BYTES: Final = 1100


class Lines(ABC):
    """Builds lines, keeping rendered parts from batch to batch.  Use `open_lines`; one for each enricher."""

    def __init__(
        self,
        paths: PathFilter,
        redactor: Redactor | None = None,
        frames: FrameNamer | None = None,
        *,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self._paths = paths
        self.events_max_bytes = int(cache_bytes * EVENTS_SHARE)
        self._places_max_bytes = int(cache_bytes * PLACES_SHARE)
        self._places_bytes = 0
        self.redactor = redactor or Redactor()
        self._frames = frames
        self._rendered: tuple[str, str, list[str], int] = ("", "", [], 0)
        #: The places of former batches, with what they were rendered from.
        self._places: dict[tuple[str, int, int], tuple[Container, Program | None, _Place]] = {}

    def build(self, batch: RawBatch, container_of: Callable[[int], Container]) -> Enriched:
        """Return the batch's lines.  Raises `BrokenPromise` when its bytes cannot be records."""
        key = (batch.node, batch.boot_id, batch.libraries, self._frames.generation if self._frames else 0)
        if key != self._rendered:
            # Another node's or boot's fields, or other library indexes, would be wrong in kept parts; and when
            # more symbols are known than before, kept parts say too little.
            self._rendered = key
            self._forget()
        parts, counted, filtered, by_cgroup = self._put_together(batch, container_of)
        if len(self._places) > PLACES_MAX or self._places_bytes > self._places_max_bytes:
            self._places.clear()
            self._places_bytes = 0
        return Enriched(parts, _ledger(batch.ledger, counted, filtered), by_cgroup)

    @abstractmethod
    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int], dict[int, int]]:
        """Return the parts, how many records were counted and filtered in each lane, and the lines of each cgroup."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop every kept part."""

    @abstractmethod
    def _kept(self) -> tuple[int, int]:
        """Return how many distinct events are kept, and what they take."""

    def stats(self) -> dict[str, dict[str, object]]:
        """Return the figures of both memories, for the heartbeat.  Between batches they are within their bounds."""
        events, size = self._kept()
        return {
            "events": {
                "entries": events,
                "max_entries": FRAGMENTS_MAX,
                "bytes": size,
                "max_bytes": self.events_max_bytes,
            },
            "places": {
                "entries": len(self._places),
                "max_entries": PLACES_MAX,
                "bytes": self._places_bytes,
                "max_bytes": self._places_max_bytes,
            },
        }

    def _fragment(self, batch: RawBatch, what: bytes) -> _Fragment:
        """Render a what of the batch."""
        kind, call, _, comm = WHAT.unpack_from(what)
        if call >= len(CALL_SOURCES):
            raise BrokenPromise(f"a record of unknown call {call}")
        event = decode_event(kind, call, what[WHAT.size :], batch.libraries)
        if isinstance(event, ProcessExec):
            event = self._redacted(event)
        wanted = not isinstance(event, FileOpen) or event.path is None or self._paths.decide(event.path)
        if self._frames is not None and isinstance(event, WithStack) and event.stack:
            event = self._frames.named(event)
        elif self._frames is not None and isinstance(event, FunctionCall):
            event = self._frames.named_function(event)
        name = text(comm.split(b"\0", 1)[0])
        return _Fragment(
            type=kind if wanted else 0,
            comm=f'"comm":{_text(name)},',
            event=f'"event":{_json(event).decode()},' if wanted else "",
            source=f'"src":{_text(CALL_SOURCES[call])},',
            anonymous=isinstance(event, Throttle) or (isinstance(event, TcpState) and event.attribution == "none"),
        )

    def _place(self, batch: RawBatch, cgroup: int, program: int, container: Container) -> _Place:
        """Return the texts of a place, rendered anew where anything that they say has changed."""
        key = (batch.boot_id, cgroup, program)
        said = batch.programs.get(program)
        kept = self._places.get(key)
        if kept is not None and (kept[0] is container or kept[0] == container) and kept[1] == said:
            return kept[2]
        place = _rendered_place(batch, cgroup, program, container)
        self._places[key] = (container, said, place)
        if kept is None:
            self._places_bytes += _PLACE_BYTES + text_bytes(place.before, place.between, place.after, place.late)
        return place

    def _redacted(self, event: ProcessExec) -> ProcessExec:
        cut = event.argv_truncated or event.argv_reason is not None
        script = event.interpreter is not None
        redacted = self.redactor.redact(event.argv, event.filename, script=script, cut=cut)
        if not redacted.changed:
            return event
        return msgspec.structs.replace(event, argv=redacted.argv, argv_redacted=redacted.changed, argv_bytes=None)


def _rendered_place(batch: RawBatch, cgroup: int, program: int, container: Container) -> _Place:
    between = ""
    after = _program(batch, program)
    if container.container_id:
        between = f'"container_id":{_text(container.container_id)},'
        if container.container_id.startswith("unknown:"):
            between += f'"container_reason":{_text(container.reason)},'
        if container.image_digest:
            after += f'"image_digest":{_text(container.image_digest)},'
            if container.image_digest_kind:
                after += f'"image_digest_kind":{_text(container.image_digest_kind)},'
        if container.image_name:
            after += f'"image_name":{_text(container.image_name)},'
        if not container.image_digest and container.image_reason:
            after += f'"image_reason":{_text(container.image_reason)},'
        if container.image_repo_digests:
            after += f'"image_repo_digests":{_json(container.image_repo_digests).decode()},'
        if container.labels:
            after += f'"labels":{_json(dict(container.labels)).decode()},'
    before = f'{{"boot_id":{_text(batch.boot_id)},"cgroup_id":{cgroup},'
    return _Place(before, between, after, _pod(container.pod) if container.pod is not None else "")


def _pod(pod: Pod) -> str:
    said = events.Pod(name=pod.name, namespace=pod.namespace, container=pod.container or None)
    return f'"pod":{_json(said).decode()},'


def _program(batch: RawBatch, key: int) -> str:
    """Render what is known of a program, nothing where no process is named."""
    if key == PROGRAM_NONE:
        return ""
    program = batch.programs.get(key, FORGOTTEN_PROGRAM)
    exe = f'"exe":{_text(program.path)},' if program.path else ""
    build_id = f'"exe_build_id":{_text(program.build_id)},' if program.build_id else ""
    reason = f'"exe_reason":{_text(program.reason)},' if program.reason else ""
    return exe + build_id + reason


def _text(value: str) -> str:
    return _json(value).decode()


def _packed(lines: bytes | memoryview) -> bytes:
    try:
        return compressed.pack(lines)
    except ValueError as e:
        # A traced program chose names (a library's path) that no message holds; it must not stop the pool.
        raise BrokenPromise(str(e)) from None


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

    def __init__(
        self,
        paths: PathFilter,
        redactor: Redactor | None = None,
        frames: FrameNamer | None = None,
        *,
        cache_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(paths, redactor, frames, cache_bytes=cache_bytes)
        self._fragments: dict[bytes, _Fragment] = {}
        self._fragments_bytes = 0

    def _forget(self) -> None:
        self._fragments.clear()
        self._fragments_bytes = 0

    def _kept(self) -> tuple[int, int]:
        return len(self._fragments), self._fragments_bytes

    def _known(self, batch: RawBatch, what: bytes) -> _Fragment:
        fragment = self._fragments.get(what)
        if fragment is None:
            fragment = self._fragments[what] = self._fragment(batch, what)
            size = len(what) + text_bytes(fragment.comm, fragment.event, fragment.source)
            self._fragments_bytes += size + SLOT_BYTES + _FRAGMENT_BYTES
        return fragment

    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int], dict[int, int]]:
        out: dict[int, list[str]] = {}
        counted: dict[int, int] = {}
        filtered: dict[int, int] = {}
        by_cgroup: dict[int, int] = {}
        taken_apart = unpack_batch(batch.records)
        whats = [self._known(batch, what) for what in taken_apart.whats]
        places: dict[tuple[int, int], _Place] = {}
        for cgroup, _, program, *_, lane in taken_apart.whos:
            if lane >= LANES_MAX:
                raise BrokenPromise(f"a batch of lane {lane}")
            if (cgroup, program) not in places:
                places[cgroup, program] = self._place(batch, cgroup, program, container_of(cgroup))
        node = f'"node":{_text(batch.node)},'
        run = f'"run":{_text(batch.run)},'
        for ts, seq, who, what in taken_apart.events:
            fragment = whats[what]
            cgroup, start_ns, program, tgid, tid, uid, lane = taken_apart.whos[who]
            counted[lane] = counted.get(lane, 0) + 1
            if not fragment.type:
                filtered[lane] = filtered.get(lane, 0) + 1
                continue
            by_cgroup[cgroup] = by_cgroup.get(cgroup, 0) + 1
            place = places[cgroup, program]
            comm, pid, thread, user = fragment.comm, f'"pid":{tgid},', f'"tid":{tid},', f',"uid":{uid}'
            if start_ns:
                thread = f'"start_ns":{start_ns},{thread}'
            if fragment.anonymous:
                comm = pid = thread = user = ""
            out.setdefault(fragment.type, []).append(
                f'{place.before}{comm}{place.between}{fragment.event}{place.after}"lane":{lane},{node}{pid}{place.late}{run}'
                f'"seq":{seq},{fragment.source}{thread}"ts_ns":{ts}{user}}}\n'
            )
        parts = [Part(TYPE_NAMES[kind], len(out[kind]), _packed("".join(out[kind]).encode())) for kind in sorted(out)]
        if len(self._fragments) > FRAGMENTS_MAX or self._fragments_bytes > self.events_max_bytes:
            self._forget()
        return parts, counted, filtered, by_cgroup


class CLines(Lines):
    """The loop in C."""

    def __init__(
        self,
        paths: PathFilter,
        redactor: Redactor | None = None,
        frames: FrameNamer | None = None,
        *,
        cache_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(paths, redactor, frames, cache_bytes=cache_bytes)
        lib = ctypes.CDLL(str(NATIVE))
        lib.stella_lines_new.restype = c_void_p
        lib.stella_lines_new.argtypes = (c_uint32, c_uint32, c_uint32, c_uint64, c_uint64)
        lib.stella_lines_free.argtypes = (c_void_p,)
        lib.stella_lines_forget.argtypes = (c_void_p,)
        lib.stella_lines_trim.argtypes = (c_void_p,)
        lib.stella_lines_kept.restype = c_uint32
        lib.stella_lines_kept.argtypes = (c_void_p, POINTER(c_uint64))
        lib.stella_lines_begin.argtypes = (c_void_p, c_char_p, c_uint32, c_char_p, c_uint32)
        lib.stella_lines_run.restype = c_int
        lib.stella_lines_run.argtypes = (c_void_p, c_char_p, c_uint64, POINTER(c_uint64))
        lib.stella_lines_add_event.restype = c_int
        lib.stella_lines_add_event.argtypes = (
            c_void_p, c_char_p, c_uint32, c_uint8, c_uint8,
            c_char_p, c_uint32, c_char_p, c_uint32, c_char_p, c_uint32,
        )  # fmt: skip
        lib.stella_lines_add_place.restype = c_int
        lib.stella_lines_add_place.argtypes = (
            c_void_p, c_uint64, c_uint64, POINTER(c_char_p), POINTER(c_uint32),
        )  # fmt: skip
        lib.stella_lines_output.restype = c_void_p
        lib.stella_lines_output.argtypes = (c_void_p, c_uint32, POINTER(c_uint64), POINTER(c_uint64))
        lib.stella_lines_of_whos.restype = POINTER(c_uint32)
        lib.stella_lines_of_whos.argtypes = (c_void_p,)
        lib.stella_lines_counts.restype = POINTER(c_uint64)
        lib.stella_lines_counts.argtypes = (c_void_p, c_int)
        self._lib = lib
        self._lanes = LANES_MAX
        # Twice the slots, so that probing stays short.
        self._table = lib.stella_lines_new(
            FRAGMENTS_MAX.bit_length(), PLACES_LOG2, self._lanes, secrets.randbits(64), self.events_max_bytes
        )
        if not self._table:
            raise MemoryError("no memory for the table of events")

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self._lib.stella_lines_free(self._table)
            self._table = None

    def _forget(self) -> None:
        self._lib.stella_lines_forget(self._table)

    def _kept(self) -> tuple[int, int]:
        size = c_uint64()
        return int(self._lib.stella_lines_kept(self._table, byref(size))), size.value

    def _put_together(
        self, batch: RawBatch, container_of: Callable[[int], Container]
    ) -> tuple[list[Part], dict[int, int], dict[int, int], dict[int, int]]:
        lib, table, data = self._lib, self._table, batch.records
        node = f'"node":{_text(batch.node)},'.encode()
        run = f'"run":{_text(batch.run)},'.encode()
        if lib.stella_lines_begin(table, node, len(node), run, len(run)):
            raise MemoryError("no memory for a batch")
        missing = c_uint64(0)
        while (answer := lib.stella_lines_run(table, data, len(data), byref(missing))) != _DONE:
            at = missing.value
            if answer == _NEED_EVENT:
                key = data[at : at + WHAT.unpack_from(data, at)[2]]
                fragment = self._fragment(batch, key)
                comm, event, source = fragment.comm.encode(), fragment.event.encode(), fragment.source.encode()
                answer = lib.stella_lines_add_event(
                    table, key, len(key), fragment.type, fragment.anonymous,
                    comm, len(comm), event, len(event), source, len(source),
                )  # fmt: skip
            elif answer == _NEED_PLACE:
                cgroup, _, program, *_ = WHO.unpack_from(data, BATCH_COUNTS.size + at * WHO.size)
                place = self._place(batch, cgroup, program, container_of(cgroup))
                texts = [text.encode() for text in (place.before, place.between, place.after, place.late)]
                answer = lib.stella_lines_add_place(
                    table, cgroup, program, (c_char_p * 4)(*texts), (c_uint32 * 4)(*map(len, texts))
                )
            if answer == _NO_MEMORY:
                raise MemoryError("no memory for a batch")
            if answer == _MALFORMED:
                raise BrokenPromise(f"{len(data)} bytes cannot be a batch (looked at {at})")
        parts = []
        length, lines = c_uint64(), c_uint64()
        for kind, name in TYPE_NAMES.items():
            at_text = lib.stella_lines_output(table, kind, byref(length), byref(lines))
            if lines.value:
                # Compressed where they stand: nobody needs a copy.
                text = (c_uint8 * length.value).from_address(at_text)
                parts.append(Part(name, lines.value, _packed(memoryview(text).cast("B"))))
        counted, filtered = lib.stella_lines_counts(table, 0), lib.stella_lines_counts(table, 1)
        lanes = [row.lane for row in batch.ledger.lanes if row.lane < self._lanes]
        found = {lane: counted[lane] for lane in lanes if counted[lane]}
        dropped = {lane: filtered[lane] for lane in lanes if filtered[lane]}
        if sum(found.values()) != counted[self._lanes]:
            raise BrokenPromise("the batch holds records of lanes that its ledger does not name")
        by_cgroup: dict[int, int] = {}
        of_whos = lib.stella_lines_of_whos(table)
        for index in range(BATCH_COUNTS.unpack_from(data)[0] if data else 0):
            if of_whos[index]:
                cgroup = WHO.unpack_from(data, BATCH_COUNTS.size + index * WHO.size)[0]
                by_cgroup[cgroup] = by_cgroup.get(cgroup, 0) + of_whos[index]
        lib.stella_lines_trim(table)
        return parts, found, dropped, by_cgroup


def open_lines(paths: PathFilter, redactor: Redactor, frames: FrameNamer, *, cache_bytes: int) -> Lines:
    """Return the best builder there is.  It takes its shares of `cache_bytes`."""
    if NATIVE.exists():
        return CLines(paths, redactor, frames, cache_bytes=cache_bytes)
    log.warning("the C line builder is not built; building lines in Python, which costs more")
    return PythonLines(paths, redactor, frames, cache_bytes=cache_bytes)


def all_lost(ledger: Ledger) -> Ledger:
    """Return the ledger of a batch whose records cannot be used: what they were is lost, by the enricher."""
    rows = [LaneRow(r.lane, r.first, r.next, 0, r.filtered, r.lost + r.recorded) for r in ledger.lanes]
    gone = sum(r.recorded for r in ledger.lanes)
    lost = {**ledger.lost, "enricher": ledger.lost.get("enricher", 0) + gone} if gone else ledger.lost
    return Ledger(ledger.start_ns, ledger.end_ns, rows, ledger.filtered, lost)
