"""Parts of batches in, complete batches out: grouped, checked, each once.  Pure: no bus, no time.

A batch is complete when all its parts are here; which enricher sent a part makes no difference, and of two
copies the first wins.  Whoever offers a part hands over `T`, the handle to acknowledge it by.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Final, Generic, TypeVar

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.evidence.canonical import MAX_SAFE_INTEGER
from stella_shared.evidence.compressed import Packed
from stella_shared.wire import Ledger, PartHead, ledger_faults
from stella_signer.steps import Settle

MAX_PARTS: Final = 64
MAX_COPIES: Final = 4
#: Different causes in one life of the signer: they all stand in the statement, which is bounded.
MAX_CAUSES: Final = 40
MAX_LANES: Final = 1 << 16
MAX_COVERAGE_BYTES: Final = 1 << 20
MAX_TIME_NS: Final = 2**63 - 1
_NAME: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_CAUSE: Final = re.compile(r"[a-z0-9_]{1,48}")

T = TypeVar("T")


class Verdict(Enum):
    """What became of an offered part."""

    KEPT = "kept"  # acknowledge it when its batch is durable
    REPEATED = "repeated"  # it is in the evidence already: acknowledge it
    REFUSED = "refused"  # it never can be: say so, and never see it again


class Batch(msgspec.Struct, Generic[T], frozen=True):
    """A complete batch: its step, its lines, and the handles of its parts."""

    step: Settle
    body: Packed
    handles: list[T]
    oldest_ns: int
    drained_ns: int


class _Parts(Generic[T]):
    """A batch of which some parts are here."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.heads: dict[int, PartHead] = {}
        self.bodies: dict[int, Packed] = {}
        self.handles: dict[int, list[T]] = {}


def _all(parts: _Parts[T]) -> list[T]:
    return [handle for handles in parts.handles.values() for handle in handles]


class Intake(Generic[T]):
    """Puts parts together.  `is_settled(run, number)` and `boot_of(run)` answer for what is in the evidence."""

    def __init__(self, node: str, is_settled: Callable[[str, int], bool], boot_of: Callable[[str], str | None]) -> None:
        self._node = node
        self._is_settled = is_settled
        self._boot_of = boot_of
        self._waiting: dict[tuple[str, int], _Parts[T]] = {}
        self._complete: dict[tuple[str, int], Batch[T]] = {}
        self._causes: set[str] = set()
        #: What the complete batches take in memory.
        self.bytes = 0
        self.last_refusal = ""

    def offer(self, head: PartHead, data: bytes, handle: T) -> Verdict:
        """Take a part, the frame of its lines in `data`, and return what becomes of it.

        A refused part is counted by nobody here: its batch will be missing, and missing batches are lost.
        """
        place = (head.run, head.number)
        body = Packed()
        try:
            body = Packed.of(data)
            fault = self._fault(head, body.lines)
        except ValueError as e:
            fault = str(e)
        if fault:
            self.last_refusal = f"run {head.run} batch {head.number} part {head.part}: {fault}"
            return Verdict.REFUSED
        if self._is_settled(*place):
            return Verdict.REPEATED
        if complete := self._complete.get(place):
            complete.handles.append(handle)
            return Verdict.KEPT
        here = self._waiting.get(place)
        if here is None or here.parts != head.parts:
            # (Another enricher cut the same batch otherwise: two cuts cannot be mixed.)
            here = self._waiting[place] = _Parts(head.parts)
        # The first copy's bytes stay; every delivery is acknowledged, or the newest when there are many.
        handles = here.handles.setdefault(head.part, [])
        handles.append(handle)
        del handles[:-MAX_COPIES]
        if head.part not in here.heads:
            here.heads[head.part], here.bodies[head.part] = head, body
        if len(here.heads) == here.parts:
            del self._waiting[place]
            self._put_together(place, here)
        return Verdict.KEPT

    def take(self) -> list[Batch[T]]:
        """Return the complete batches, each run's in its order, and forget them."""
        batches = list(self._complete.values())
        order = {run: i for i, run in enumerate(dict.fromkeys(batch.step.run for batch in batches))}
        batches.sort(key=lambda batch: (order[batch.step.run], batch.step.number))
        self._complete.clear()
        self.bytes = 0
        return batches

    def drop_settled(self) -> list[T]:
        """Forget parts of batches that were given up meanwhile; return their handles."""
        dropped = [place for place in self._waiting if self._is_settled(*place)]
        return [handle for place in dropped for handle in _all(self._waiting.pop(place))]

    @property
    def incomplete(self) -> int:
        """Batches of which some parts are missing."""
        return len(self._waiting)

    @property
    def complete(self) -> int:
        """Batches that `take` would return."""
        return len(self._complete)

    def _put_together(self, place: tuple[str, int], parts: _Parts[T]) -> None:
        first = parts.heads[0]
        ledger = first.ledger
        if ledger is None:
            raise BrokenPromise("a part 0 without a ledger was let in")
        body = Packed.join([parts.bodies[part] for part in range(parts.parts)])
        lines = sum(head.lines for head in parts.heads.values())
        recorded = sum(row.recorded for row in ledger.lanes)
        if lines != recorded:
            self.last_refusal = f"run {first.run} batch {first.number}: {lines} lines, but its ledger says {recorded}"
            # The ledger is honest and the lines are not all there: none is kept, and all are counted.
            ledger, body, lines = _all_lost(ledger), Packed(), 0
        step = Settle(
            first.boot_id, first.run, first.number, lines, ledger, first.coverage, first.final, first.closings
        )
        self._complete[place] = Batch(step, body, _all(parts), first.oldest_ns, first.drained_ns)
        self.bytes += len(body.frames) + len(body.leaves)

    def _fault(self, head: PartHead, lines: int) -> str:
        """Return why a part cannot be taken, or ""."""
        if head.node != self._node:
            return f"it is of node {head.node!r}"
        names = [head.run, head.boot_id, *(n for closing in head.closings for n in (closing.run, closing.boot_id))]
        if not all(map(_NAME.fullmatch, names)):
            return "a run or boot id is no name"
        if not 0 <= head.part < head.parts <= MAX_PARTS or not 0 <= head.number <= MAX_SAFE_INTEGER:
            return f"part {head.part} of {head.parts}, batch {head.number} cannot be"
        if (self._boot_of(head.run) or head.boot_id) != head.boot_id:
            return f"its run belongs to another boot than {head.boot_id}"
        if head.lines != lines:
            return f"{lines} lines, but its head says {head.lines}"
        if head.part:
            return ""
        return _head_fault(head) or self._causes_fault(head)

    def _causes_fault(self, head: PartHead) -> str:
        """Return what is wrong with the causes of a part 0, or ""; remember them."""
        filtered = [dict(head.ledger.filtered if head.ledger else {}), *(c.filtered for c in head.closings)]
        causes = {*(cause for counts in filtered for cause in counts), *(head.ledger.lost if head.ledger else ())}
        if not all(map(_CAUSE.fullmatch, causes)) or len(self._causes | causes) > MAX_CAUSES:
            return "a cause is no name, or there are too many"
        self._causes |= causes
        return ""


def _head_fault(head: PartHead) -> str:
    """Return what is wrong with the accounting of a part 0, or ""."""
    ledger = head.ledger
    if ledger is None:
        return "part 0 has no ledger"
    if faults := ledger_faults(ledger):
        return faults[0]
    numbers = [n for row in ledger.lanes for n in (row.lane, row.first, row.next)]
    counts = [*ledger.filtered.values(), *ledger.lost.values()]
    for closing in head.closings:
        numbers += [n for pair in closing.taken.items() for n in pair]
        counts += closing.filtered.values()
    if min([0, *numbers, *counts]) < 0 or max([0, *numbers, *counts]) > MAX_SAFE_INTEGER:
        return "a number is negative or beyond 2^53-1"
    if not 0 <= ledger.start_ns <= MAX_TIME_NS or not 0 <= ledger.end_ns <= MAX_TIME_NS:
        return "its times cannot be"
    lanes = {row.lane for row in ledger.lanes}
    if len(lanes) != len(ledger.lanes) or len(lanes) > MAX_LANES:
        return "a lane is listed twice, or there are too many"
    if any(not cause.startswith(("kernel_", "user_")) for cause in ledger.filtered):
        return "a filter cause is neither kernel_ nor user_"
    return _coverage_fault(head.coverage)


def _coverage_fault(text: str) -> str:
    if not text:
        return ""
    if len(text) > MAX_COVERAGE_BYTES:
        return f"a coverage document of {len(text)} characters"
    try:
        document = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        return f"coverage: {e}"
    return "" if isinstance(document, dict) else "coverage is no JSON object"


def _all_lost(ledger: Ledger) -> Ledger:
    """Return the ledger with every recorded number lost instead, cause `signer`."""
    recorded = sum(row.recorded for row in ledger.lanes)
    rows = [msgspec.structs.replace(row, recorded=0, lost=row.lost + row.recorded) for row in ledger.lanes]
    lost = {**ledger.lost, "signer": ledger.lost.get("signer", 0) + recorded}
    return msgspec.structs.replace(ledger, lanes=rows, lost=lost)
