"""From a raw batch to canonical evidence lines.  Pure.

Most events repeat: the same program opens the same file from the same container.  So the costly parts of a
line are made once for each distinct thing and kept: the event with its thread name by the record's own bytes,
the container's fields by cgroup id.  What is left for each event is one unpack, two look-ups and one format.

`tests/enricher/test_lines.py` holds this to the slow and obvious way: decode, `events.EvidenceLine`, sort.
"""

from __future__ import annotations

from collections.abc import Callable
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
from stella_shared.wire import LaneRow, Ledger, RawBatch

#: Distinct events that are kept; beyond it the table starts anew.
FRAGMENTS_MAX: Final = 65_536
_COMM_AT: Final = 48
_HEADER: Final = RECORD_HEADER.size
_json = msgspec.json.Encoder(order="sorted").encode


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
    """What is the same in every line of one distinct event.  `type` None: filtered."""

    type: int | None
    comm: str
    event: str
    source: str
    anonymous: bool


class _Place(msgspec.Struct, frozen=True, gc=False):
    """What is the same in every line of one cgroup."""

    container: Container
    before: str
    between: str
    after: str


class Lines:
    """Builds lines, keeping fragments from batch to batch.  One for each enricher."""

    def __init__(self, paths: PathFilter) -> None:
        self._paths = paths
        self._fragments: list[dict[bytes, _Fragment]] = [{} for _ in CALL_SOURCES]
        self._places: dict[int, _Place] = {}
        self._batch_key: tuple[str, str, list[str]] = ("", "", [])

    def build(self, batch: RawBatch, container_of: Callable[[int], Container]) -> Enriched:
        """Return the batch's lines.  Raises `BrokenPromise` when its bytes cannot be records."""
        key = (batch.node, batch.boot_id, batch.libraries)
        if key != self._batch_key:
            # Another node's or boot's fields, or other library indexes, would be wrong in kept fragments.
            self._batch_key = key
            self._forget()
        out: dict[int, list[str]] = {}
        counted: dict[int, int] = {}
        filtered: dict[int, int] = {}
        data = batch.records
        at, end = 0, len(data)
        unpack = RECORD_HEADER.unpack_from
        fragments = self._fragments
        places = {}
        tail_node = f'"node":{_text(batch.node)},'
        tail_run = f'"run":{_text(batch.run)},'
        while at < end:
            try:
                ts, seq, cgroup, tgid, tid, uid, lane, kind, call, size, _ = unpack(data, at)
                fragment = fragments[call].get(data[at + _COMM_AT : at + size])
            except (IndexError, ValueError) as e:
                raise BrokenPromise(f"a record at {at} of {end}: {e}") from None
            if fragment is None:
                fragment = self._fragment(batch, kind, call, data[at : at + size], size, end - at)
            at += size
            counted[lane] = counted.get(lane, 0) + 1
            if fragment.type is None:
                filtered[lane] = filtered.get(lane, 0) + 1
                continue
            place = places.get(cgroup)
            if place is None:
                place = places[cgroup] = self._place(batch.boot_id, cgroup, container_of(cgroup))
            lines = out.get(fragment.type)
            if lines is None:
                lines = out[fragment.type] = []
            if fragment.anonymous:
                lines.append(
                    f'{place.before}{place.between}{fragment.event}{place.after}"lane":{lane},{tail_node}'
                    f'{tail_run}"seq":{seq},{fragment.source}"ts_ns":{ts}}}\n'
                )
            else:
                lines.append(
                    f'{place.before}{fragment.comm}{place.between}{fragment.event}{place.after}"lane":{lane},'
                    f'{tail_node}"pid":{tgid},{tail_run}"seq":{seq},{fragment.source}"tid":{tid},"ts_ns":{ts},"uid":{uid}}}\n'
                )
        parts = [Part(TYPE_NAMES[kind], len(out[kind]), "".join(out[kind]).encode()) for kind in sorted(out)]
        return Enriched(parts, self._ledger(batch.ledger, counted, filtered))

    @staticmethod
    def _ledger(ledger: Ledger, counted: dict[int, int], filtered: dict[int, int]) -> Ledger:
        told = {row.lane: row.recorded for row in ledger.lanes if row.recorded}
        if told != counted:
            raise BrokenPromise(f"the batch's ledger speaks of records {told}, but it holds {counted}")
        if not filtered:
            return ledger
        rows = [
            LaneRow(r.lane, r.first, r.next, r.recorded - filtered.get(r.lane, 0), filtered.get(r.lane, 0), r.lost)
            for r in ledger.lanes
        ]
        causes = {**ledger.filtered, "user_path": sum(filtered.values())}
        return Ledger(ledger.start_ns, ledger.end_ns, rows, causes, ledger.lost)

    def _forget(self) -> None:
        for table in self._fragments:
            table.clear()
        self._places.clear()

    def _fragment(self, batch: RawBatch, kind: int, call: int, record: bytes, size: int, room: int) -> _Fragment:
        if size < _HEADER or size % 8 or size > room:
            raise BrokenPromise(f"a record of {size} bytes where {room} are left")
        event = decode_event(kind, call, record[_HEADER:], batch.libraries)
        wanted = not (isinstance(event, FileOpen) and event.path is not None and not self._paths.decide(event.path))
        comm = text(record[_COMM_AT:_HEADER].split(b"\0", 1)[0])
        fragment = _Fragment(
            type=kind if wanted else None,
            comm=f'"comm":{_text(comm)},',
            event=f'"event":{_json(event).decode()},' if wanted else "",
            source=f'"src":{_text(CALL_SOURCES[call])},',
            anonymous=isinstance(event, TcpState) and event.attribution == "none",
        )
        table = self._fragments[call]
        if len(table) >= FRAGMENTS_MAX:
            table.clear()
        table[record[_COMM_AT:]] = fragment
        return fragment

    def _place(self, boot_id: str, cgroup: int, container: Container) -> _Place:
        known = self._places.get(cgroup)
        if known is not None and known.container is container:
            return known
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
        if len(self._places) >= FRAGMENTS_MAX:
            self._places.clear()
        place = _Place(container, f'{{"boot_id":{_text(boot_id)},"cgroup_id":{cgroup},', between, after)
        self._places[cgroup] = place
        return place


def _text(value: str) -> str:
    return _json(value).decode()


def all_lost(ledger: Ledger) -> Ledger:
    """Return the ledger of a batch whose records cannot be used: what they were is lost, by the enricher."""
    rows = [LaneRow(r.lane, r.first, r.next, 0, 0, r.lost + r.recorded) for r in ledger.lanes]
    gone = sum(r.recorded for r in ledger.lanes)
    lost = {**ledger.lost, "enricher": ledger.lost.get("enricher", 0) + gone} if gone else ledger.lost
    return Ledger(ledger.start_ns, ledger.end_ns, rows, ledger.filtered, lost)
