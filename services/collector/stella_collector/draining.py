"""One run being read: ring → numbers settled → journal → named → spool, and back again after a restart.

    drain ─> settle ─> journal ─> name ─> spool ─ stored ─> the ring's room is given back
                          └── after kill -9: the same batch once more, under the same number

A batch's records stay in the ring until the bus has stored it.  Where the journal has no room for it, or the ring
none for what comes, the oldest batches are let go: they are then in this process's memory alone, and numbered as lost
(`restart`) by whoever comes after its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import anyio

from stella_collector.accounting import Accountant, all_lost, decode_counters, join
from stella_collector.journal import Journal, Written
from stella_collector.naming import Namer
from stella_collector.reading import Reading
from stella_collector.ring import CRing, Drained
from stella_collector.spool import Spool
from stella_shared import clock, raw_batches
from stella_shared.errors import BrokenPromise
from stella_shared.wire import RAW_VERSION, Closing, Histogram, Ledger, RawBatch, encode_raw

log = logging.getLogger(__name__)

#: One batch holds at most this much of the ring: some 5,000 opens.
BATCH_BYTES: Final = 1 << 20
MISSED_SECONDS: Final = 0.5
#: Programs that were running when they were detached have ended after this.
DETACHED_SECONDS: Final = 0.05


class Draining:
    """A run of `source`.  `coverage` gives the document that a batch is to carry, asked with the batch's number.

    `stored` is told the number of each batch that the bus has, and whether it was the last one.
    """

    def __init__(
        self,
        source: Reading,
        spool: Spool,
        *,
        node: str,
        run: str,
        journal: Journal | None,
        coverage: Callable[[int], bytes],
        stored: Callable[[int, bool], None],
    ) -> None:
        self.source = source
        self.node = node
        self.run = run
        self.boot_id = clock.boot_id()
        self.accountant = Accountant(source.lanes)
        self.namer = Namer(source.cgroup, source.program)
        self.closings: list[Closing] = []
        self.number = 0
        #: Whether the final batch is on its way.
        self.ended = False
        #: Whether another collector has seen batch 0 stored.
        self.first_is_stored = False
        self.records = 0
        self.lost: dict[str, int] = {}
        self.filtered: dict[str, int] = {}
        self.fill = Histogram.with_bounds(1, 5, 10, 25, 50, 75, 80, 90, 95, 100)
        self.ring_percent = 0.0
        self._spool = spool
        self._journal = journal
        self._ring = source.ring if isinstance(source.ring, CRing) else None
        self._coverage = coverage
        self._stored = stored
        self._held: Ledger | None = None
        self._missed = 0
        self._missed_at = 0.0

    # ---- where it begins

    def begin(self) -> None:
        """Start a run of programs that nobody has read before."""
        self.accountant.begin(clock.boottime_ns())
        if self._journal is not None and self._ring is not None:
            self._ring.keep()
            self._journal.begin(self._ring.position, self.accountant.state(), self._ring.seen())

    async def resume(self) -> int:
        """Go on where another collector's journal ends; return how many of its batches are published once more.

        Raises `BrokenPromise` when journal and ring contradict each other.
        """
        if self._journal is None or self._ring is None:
            raise BrokenPromise(f"run {self.run} has no journal")
        ring = self._ring
        ring.keep()
        found = self._journal.recover(len(self.accountant.state()), ring.released)
        if found is None:
            raise BrokenPromise(f"the journal of run {self.run} holds nothing whole")
        self.accountant.restore(found.accountant)
        self.number = found.number
        self.ended = any(written.final for _, written in found.batches)
        self.first_is_stored = found.number > 0 and all(number for number, _ in found.batches)
        for number, written in found.batches:
            await self._publish_again(ring, number, written)
        ring.resume(found.position, found.seen)
        return len(found.batches)

    async def _publish_again(self, ring: CRing, number: int, written: Written) -> None:
        ledger, records = written.ledger, b""
        if written.start >= ring.released:
            drained = ring.again(written.start, written.end)
            told = sum(row.recorded for row in ledger.lanes)
            if drained.count != told:
                raise BrokenPromise(f"batch {number} had {told} records, and the ring now has {drained.count} there")
            records = drained.records
        else:
            ledger = all_lost(ledger, "restart")
        self._count(ledger)
        await self._send(number, ledger, records, written.coverage, written.final)

    # ---- one batch

    def drain(self, *, last: bool = False) -> tuple[Drained, Ledger]:
        """Drain once and settle what came; with `last`, settle every number there is."""
        source = self.source
        # Losses before numbers: what is known to be lost is then among the numbers that were handed out.
        lost_before = decode_counters(source.counters())
        taken_before = decode_counters(source.counters())
        self.ring_percent = 100.0 * source.ring.used() / source.ring.size
        self.fill.observe(self.ring_percent)
        drained = source.ring.drain(BATCH_BYTES)
        now_ns = clock.boottime_ns()
        ledger = self.accountant.settle(
            now_ns=now_ns,
            lost_before=lost_before,
            taken_before=taken_before,
            after=decode_counters(source.counters()),
            seen=source.ring.seen(),
            emptied=not drained.left,
            missed=self._missed_runs(now=last),
            last=last,
        )
        self._count(ledger)
        return drained, ledger

    def _missed_runs(self, *, now: bool) -> int:
        # A system call per program: once in a while is enough, the total is what counts.
        at = time.monotonic()
        if now or at - self._missed_at > MISSED_SECONDS:
            self._missed_at, self._missed = at, self.source.missed()
        return self._missed

    def _count(self, ledger: Ledger) -> None:
        self.records += sum(row.recorded for row in ledger.lanes)
        for cause, n in ledger.lost.items():
            self.lost[cause] = self.lost.get(cause, 0) + n
        for cause, n in ledger.filtered.items():
            self.filtered[cause] = self.filtered.get(cause, 0) + n

    def joined(self, ledger: Ledger) -> Ledger:
        """Return the ledger with what `hold` kept in front of it."""
        # What the filters counted while nothing was recorded is told with the next batch, not in one of its own.
        return ledger if self._held is None else join(self._held, ledger)

    def hold(self, ledger: Ledger) -> None:
        """Keep a ledger without numbers for the next batch."""
        self._held = ledger

    async def emit(self, ledger: Ledger, records: bytes, *, final: bool = False) -> None:
        """Write down one batch, name what is in it, encode it and put it into the spool."""
        self._held = None
        number = self.number
        coverage = self._coverage(number)
        if self._journal is not None and self._ring is not None:
            state, seen = self.accountant.state(), self._ring.seen()
            self._journal.write(self._ring.position, ledger, coverage, state, seen, final=final)
        self.number += 1
        await self._send(number, ledger, records, coverage, final)

    async def _send(self, number: int, ledger: Ledger, records: bytes, coverage: bytes, final: bool) -> None:
        distinct = raw_batches.names(records)
        await self.namer.settle(distinct)
        cgroups, programs = self.namer.names(distinct)
        batch = RawBatch(
            version=RAW_VERSION,
            node=self.node,
            boot_id=self.boot_id,
            run=self.run,
            number=number,
            ledger=ledger,
            coverage=coverage,
            final=final,
            closings=self.closings if number == 0 else [],
            libraries=list(self.source.libraries),
            records=records,
            cgroups=cgroups,
            programs=programs,
        )
        self._spool.put(f"{self.run}.{number}", encode_raw(batch), lambda: self._on_stored(number, final))

    def _on_stored(self, number: int, final: bool) -> None:
        if self._journal is not None:
            self._journal.acked(number)
            self._release()
        self._stored(number, final)

    def relieve(self) -> None:
        """Let the oldest batches go where they keep too much of the ring."""
        if self._journal is not None:
            self._journal.give_up(self.source.ring.size, self.source.ring.used())
            self._release()

    def _release(self) -> None:
        if self._journal is not None and self._ring is not None:
            position = self._journal.releasable()
            if position > self._ring.released:
                self._ring.release(position)

    @property
    def keeps(self) -> bool:
        """Whether another collector can go on with this run."""
        return self._journal is not None

    @property
    def let_go(self) -> int:
        """Batches that were in this process's memory alone while they were on their way."""
        return self._journal.let_go if self._journal is not None else 0

    # ---- the end

    async def finish(self) -> None:
        """Detach, settle every number, and put the final batch into the spool."""
        await anyio.to_thread.run_sync(self.source.detach)
        await anyio.sleep(DETACHED_SECONDS)
        final = False
        while not final:
            counts_left = self.source.flush()
            final = not counts_left and self.source.ring.waiting() <= BATCH_BYTES // 2
            drained, ledger = self.drain(last=final)
            await self.emit(self.joined(ledger), drained.records, final=final)
            self.relieve()
