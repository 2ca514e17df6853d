"""The enricher: takes raw batches, gives evidence lines.  Stateless: any of N may take any batch.

    stella.raw.* → decode → containers → lines → stella.enriched.<node>.<type> → ack

A batch is acked only after all its parts are stored, so an enricher that dies leaves its batches to the
others.  Message ids come from the batch, so a batch that was enriched twice is stored once; and if the time
between is longer than the server's memory, the signer drops the second copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import msgspec

from stella_enricher.containers import Container, ContainerResolver, elsewhere, memory_bytes
from stella_enricher.frames import FrameNamer
from stella_enricher.lines import Enriched, Part, all_lost, open_lines
from stella_enricher.loudest import Loudest
from stella_enricher.redaction import SHARE, Redactor
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection
from stella_enricher.symbols import debuginfod
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.resolver import Resolver
from stella_enricher.symbols.store import Store
from stella_shared import VERSION, clock, lifecycle, metrics, privileges, raw_batches, selectors, subjects
from stella_shared.bus import Bus, Message, Work
from stella_shared.config import Signals, bus_url, bus_user, node_name, selector_texts, symbols_directory
from stella_shared.errors import BrokenPromise, TryAgain
from stella_shared.evidence import compressed
from stella_shared.patterns import PathFilter
from stella_shared.wire import HEAD_VERSION, Beat, Histogram, PartHead, RawBatch, decode_raw, encode_head

log = logging.getLogger(__name__)

TAKE: Final = 16
#: Batches that wait here for their turn.  An enricher that hangs holds on to these.
AHEAD: Final = 2 * TAKE
#: Batches whose parts are on their way to the bus at the same time.
PUBLISHING: Final = 16
LAG_CHECK_SECONDS: Final = 1.0
#: The signer's lag is looked at after so many bytes of lines, and without work this often.
LAG_CHECK_BYTES: Final = 1 << 20
LAG_IDLE_SECONDS: Final = 30.0
#: How long it waits for a message: until it stops, and then a moment for what may be on its way.
WAIT_SECONDS: Final = 60.0
LAST_WAIT_SECONDS: Final = 0.2
STOP_SECONDS: Final = 15.0
#: The rest of a message is for its headers.
PART_BYTES_MAX: Final = subjects.MAX_PAYLOAD_BYTES - (128 << 10)
RETRY_SECONDS: Final = (0.05, 1.0)
AGE_SAMPLES: Final = 5
_LATENCY_BOUNDS: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class Enricher:
    """One member of the pool."""

    def __init__(
        self,
        signals: Signals,
        instance: str,
        bus: Bus,
        resolver: ContainerResolver,
        frames: FrameNamer,
        *,
        asking: Asking | None = None,
    ) -> None:
        self.bus = bus
        self.instance = instance
        self.node = node_name(signals)
        self.boot_id = clock.boot_id()
        self.resolver = resolver
        self.asking = asking
        self.frames = frames
        redaction = signals.redaction
        cache_bytes = signals.resources.max_cache_memory_mb << 20
        self.redactor = Redactor(
            redaction.patterns, redaction.keep, enabled=redaction.enabled, max_bytes=int(cache_bytes * SHARE)
        )
        paths = PathFilter(signals.filters.paths.allowlist, signals.filters.paths.denylist)
        self.lines = open_lines(paths, self.redactor, frames, cache_bytes=cache_bytes)
        self.started_at = time.time()
        self.batches = 0
        self.poisoned = 0
        self.events: dict[str, int] = {}
        self.user_filtered = 0
        self.loudest = Loudest(time.monotonic())
        self.kernel_to_line = Histogram.with_bounds(*_LATENCY_BOUNDS)
        self.work_seconds = Histogram.with_bounds(*_LATENCY_BOUNDS)
        self.in_flight = 0
        #: Bytes of lines since the signer's lag was looked at.
        self.unlooked_bytes = 0
        self.last_error = ""
        self.held_back = False

    def _container(self, batch: RawBatch, cgroup: int) -> Container:
        path = batch.cgroups.get(cgroup)
        # Cgroup ids are this kernel's; what another node's mean, only its batch says.
        if batch.node != self.node or batch.boot_id != self.boot_id:
            return elsewhere(cgroup, path)
        return self.resolver.lookup(cgroup, path)

    async def enrich(self, data: bytes) -> tuple[RawBatch, Enriched]:
        """Return what a raw batch becomes.  A batch that cannot be used is lost by name, never silently."""
        begin = time.perf_counter()
        batch = decode_raw(data)
        try:
            here = batch.node == self.node and batch.boot_id == self.boot_id
            if batch.records and here:
                await self.resolver.settle(batch.cgroups)
            enriched = self.lines.build(batch, lambda cgroup: self._container(batch, cgroup))
            if here:
                self.frames.hint(batch.programs, batch.records)
            if await self.frames.settle(batch.records if here else b""):
                enriched = self.lines.build(batch, lambda cgroup: self._container(batch, cgroup))
            if any(len(part.frame) > PART_BYTES_MAX for part in enriched.parts):
                raise BrokenPromise(f"its lines are larger than a message may be ({PART_BYTES_MAX} bytes)")
        except BrokenPromise as e:
            self.poisoned += 1
            self.last_error = str(e)
            log.error("batch %d of run %s cannot be used: %s", batch.number, batch.run, e)
            enriched = Enriched([], all_lost(batch.ledger))
        self._measure(batch, enriched, time.perf_counter() - begin)
        return batch, enriched

    def _measure(self, batch: RawBatch, enriched: Enriched, seconds: float) -> None:
        self.batches += 1
        self.user_filtered += enriched.ledger.filtered.get("user_path", 0)
        for part in enriched.parts:
            self.events[part.type] = self.events.get(part.type, 0) + part.lines
        self.loudest.add(enriched.by_cgroup, lambda cgroup: self._container(batch, cgroup))
        self.work_seconds.observe(seconds)
        if batch.boot_id == self.boot_id and batch.records:
            now = clock.boottime_ns()
            for age_ns, times in _ages(batch, now):
                self.kernel_to_line.observe(age_ns / 1e9, times)

    async def publish(self, message: Message, batch: RawBatch, enriched: Enriched) -> None:
        """Store every part, then ack the raw batch."""
        parts = enriched.parts or [Part(subjects.LEDGER_TYPE, 0, b"")]
        now = clock.boottime_ns()
        for index, part in enumerate(parts):
            head = PartHead(
                version=HEAD_VERSION,
                node=batch.node,
                boot_id=batch.boot_id,
                run=batch.run,
                number=batch.number,
                part=index,
                parts=len(parts),
                lines=part.lines,
                ledger=enriched.ledger if index == 0 else None,
                coverage=batch.coverage.decode("utf-8", "replace") if index == 0 else "",
                final=batch.final,
                closings=batch.closings if index == 0 else [],
                oldest_ns=raw_batches.oldest_ns(batch.records),
                drained_ns=batch.ledger.end_ns,
                enriched_ns=now,
            )
            await self._insist(
                subjects.enriched(batch.node, part.type),
                part.frame,
                f"{batch.run}.{batch.number}.{index}",
                _head_text(head),
            )
        await message.ack()

    async def _insist(self, subject: str, body: bytes, msg_id: str, head: str) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            try:
                await self.bus.publish(subject, body, msg_id=msg_id, head=head, encoding=compressed.ENCODING)
                self.unlooked_bytes += len(body)
                self.last_error = ""
                return
            except TryAgain as e:
                self.last_error = str(e)
                await anyio.sleep(pause)
                pause = min(pause * 2, RETRY_SECONDS[1])

    async def serve(self, work: Work, stop: anyio.Event) -> None:
        """Enrich until told to stop, and then until nothing is left to enrich."""
        slots = anyio.Semaphore(PUBLISHING)
        waiting = anyio.CancelScope()

        async def hurry() -> None:
            await stop.wait()
            waiting.cancel()

        async def store(message: Message, batch: RawBatch, enriched: Enriched) -> None:
            try:
                await self.publish(message, batch, enriched)
            finally:
                self.in_flight -= 1
                slots.release()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hurry)
            while True:
                messages: list[Message] = []
                with anyio.move_on_after(LAST_WAIT_SECONDS if stop.is_set() else WAIT_SECONDS) as waiting:
                    messages = await work.get(TAKE, 0.0)
                for message in messages:
                    while self.held_back and not stop.is_set():
                        await message.in_progress()
                        await anyio.sleep(LAG_CHECK_SECONDS)
                    try:
                        batch, enriched = await self.enrich(message.data)
                    except BrokenPromise as e:
                        # Not even a batch: nobody knows its number, so the signer will miss it and say so.
                        self.poisoned += 1
                        log.error("a message on %s is no batch: %s", message.subject, e)
                        await message.term()
                        continue
                    await slots.acquire()
                    self.in_flight += 1
                    tasks.start_soon(store, message, batch, enriched)
                if stop.is_set() and not messages and await self._drained(work):
                    break

    async def _drained(self, work: Work) -> bool:
        if self.in_flight or work.waiting:
            return False
        try:
            return await work.pending() == (0, 0)
        except TryAgain:
            return False

    async def watch_lag(self) -> None:
        """Stop taking work while the signer is so far behind that the stream could drop what it has not seen."""
        looked_at = float("-inf")
        while True:
            now = anyio.current_time()
            if self.held_back or self.unlooked_bytes > LAG_CHECK_BYTES or now - looked_at > LAG_IDLE_SECONDS:
                looked_at, self.unlooked_bytes = now, 0
                await self._look_at_lag()
            await anyio.sleep(LAG_CHECK_SECONDS)

    async def _look_at_lag(self) -> None:
        with contextlib.suppress(TryAgain):
            lag = await self.bus.lag(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)
            if (0 < lag.limit_bytes * subjects.SIGNER_LAG_SHARE < lag.bytes) != self.held_back:
                self.held_back = not self.held_back
                going = "waiting" if self.held_back else "going on"
                log.warning("the signer is %d bytes behind: %s", lag.bytes, going)

    async def tell_targets(self) -> None:
        """Say which containers the selectors match: at once when that changes, and once a second."""
        if self.asking is None or not self.asking.selection.wanted:
            return
        selection = self.asking.selection
        while True:
            version = selection.version
            found = selectors.TargetSet(
                node=self.node,
                instance=self.instance,
                selectors=selection.sets(),
                partial=not self.asking.ready,
                truncated=selection.truncated,
            )
            await self.bus.tell(subjects.targets(self.node), selectors.encode_target_set(found))
            with anyio.move_on_after(selectors.PUBLISH_SECONDS):
                while selection.version == version:
                    await selection.changed.wait()

    def _runtime_metrics(self) -> dict[str, float]:
        if self.asking is None:
            return {}
        unknown = {metrics.key(metrics.IMAGES_UNKNOWN, reason=r): float(n) for r, n in self.asking.reasons().items()}
        up = {
            metrics.key(metrics.RUNTIME_UP, api=str(runtime["api"]), socket=str(runtime["socket"])): float(
                runtime["state"] == "ok"
            )
            for runtime in self.asking.status()
            if runtime["state"] != "not there"
        }
        return {**unknown, **up}

    def caches(self) -> dict[str, dict[str, object]]:
        """Return what each memory holds, for `stella signals cache-stats`."""
        found = self.resolver.stats()
        symbols = self.frames.stats()
        if symbols:
            kept = ("entries", "max_entries", "hits", "misses")
            found["symbols"] = {name: symbols[name] for name in kept}
            found["symbol_tables"] = {
                "entries": symbols["tables"],
                "bytes": symbols["table_bytes"],
                "max_bytes": symbols["max_table_bytes"],
                "reasons": {"no_table": symbols["without_table"]} if symbols["without_table"] else {},
            }
        found["arguments"] = {**self.redactor.stats()}
        found |= self.lines.stats()
        return found

    def beat(self) -> Beat:
        """Return this service's heartbeat."""
        containers = self.resolver.stats()
        reasons = containers["containers"]["reasons"]
        assert isinstance(reasons, dict)
        state, reason = "ok", ""
        if self.held_back:
            state, reason = "degraded", "waiting for the signer, which is far behind"
        elif self.last_error:
            state, reason = "degraded", self.last_error
        return Beat(
            service="enricher",
            instance=self.instance,
            node=self.node,
            pid=os.getpid(),
            version=VERSION,
            at=time.time(),
            started_at=self.started_at,
            state=state,
            reason=reason,
            metrics={
                **{f"stellaops_signals_events_total{{type={t}}}": float(n) for t, n in self.events.items()},
                "stellaops_signals_enrich_latency_p99": self.work_seconds.quantile(0.99) * 1000,
                "stellaops_signals_filtered_total{cause=user_path}": float(self.user_filtered),
                **{
                    metrics.key(metrics.REDACTIONS_TOTAL, cause=cause): float(n)
                    for cause, n in self.redactor.counts.items()
                },
                **{
                    metrics.key(metrics.CONTAINERS_UNKNOWN_TOTAL, reason=reason): float(n)
                    for reason, n in reasons.items()
                },
                **self._runtime_metrics(),
            },
            histograms={
                "stellaops_signals_enrich_latency_seconds": self.work_seconds,
                "stellaops_signals_kernel_to_line_latency_seconds": self.kernel_to_line,
            },
            detail={
                "batches": self.batches,
                "events": self.events,
                "poisoned": self.poisoned,
                "in_flight": self.in_flight,
                "runtimes": self.asking.status() if self.asking is not None else [],
                "containers": self.loudest.tell(time.monotonic()),
                "symbols": self.frames.stats(),
                "caches": self.caches(),
                "redaction": {"rules": self.redactor.version, "arguments": dict(self.redactor.counts)},
                "privileges": privileges.left(),
            },
        )


def _head_text(head: PartHead) -> str:
    """Return the head for the wire; a coverage document that no header can carry goes by its digest."""
    try:
        return encode_head(head)
    except BrokenPromise as e:
        log.error("%s: its coverage document goes by digest alone", e)
        digest = hashlib.sha256(head.coverage.encode()).hexdigest()
        return encode_head(msgspec.structs.replace(head, coverage=f'{{"left_out_sha256":"{digest}"}}'))


def _ages(batch: RawBatch, now_ns: int) -> list[tuple[int, int]]:
    """Return (age in ns, events) samples: events came about evenly between the first one and the drain."""
    oldest = raw_batches.oldest_ns(batch.records)
    newest = max(oldest, batch.ledger.end_ns)
    count = sum(row.recorded for row in batch.ledger.lanes)
    weight = max(1, count // AGE_SAMPLES)
    return [(now_ns - oldest - (newest - oldest) * i // AGE_SAMPLES, weight) for i in range(AGE_SAMPLES)]


def _symbols(signals: Signals) -> Resolver | None:
    """Return what resolves addresses, None when that is switched off."""
    symbols, resources = signals.symbols, signals.resources
    if not symbols.enabled:
        return None
    return Resolver(
        Finder([Path(directory) for directory in symbols.debug_directories]),
        Store(symbols_directory(signals), symbols.store_max_mb << 20),
        max_answers=resources.symbol_cache_max_entries,
        max_table_bytes=(resources.max_cache_memory_mb << 20) // 4,
        fetch=partial(debuginfod.fetch, symbols.debuginfod_urls) if symbols.debuginfod_urls else None,
    )


def _asking(signals: Signals) -> Asking | None:
    """Return what asks the container runtimes, None when none is to be asked."""
    finder = SocketFinder(signals.runtimes)
    if not finder.wanted:
        return None
    return Asking(
        finder,
        labels=signals.runtimes.labels,
        selection=Selection(selectors.selectors(selector_texts(signals))),
        max_bytes=memory_bytes(signals.resources),
        ttl_seconds=signals.resources.container_cache_ttl_seconds,
    )


async def serve(signals: Signals, instance: str) -> None:
    """Run an enricher until it is told to stop."""
    instance = instance or f"{node_name(signals)}-{os.getpid()}"
    account = bus_user(signals, "enricher")
    async with contextlib.AsyncExitStack() as stack:
        stop = stack.enter_context(lifecycle.stop_event())
        connecting = Bus.connect(bus_url(signals), name=instance, account=account, tls=signals.bus.tls)
        bus = await stack.enter_async_context(connecting)
        work = await stack.enter_async_context(
            bus.work(
                subjects.RAW_STREAM,
                subjects.RAW_DURABLE,
                filter_subject=subjects.RAW_SUBJECTS,
                max_ack_pending=subjects.MAX_ACK_PENDING,
                ahead=AHEAD,
            )
        )
        frames = stack.enter_context(
            FrameNamer(_symbols(signals), ahead=bool(signals.probes.stacks or signals.probes.functions))
        )
        asking = _asking(signals)
        resolver = ContainerResolver(signals.resources, asking)
        enricher = Enricher(signals, instance, bus, resolver, frames, asking=asking)
        done = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(enricher.resolver.run)
            tasks.start_soon(enricher.watch_lag)
            tasks.start_soon(enricher.tell_targets)
            tasks.start_soon(lifecycle.beating, bus, enricher.beat, done)
            with anyio.move_on_after(float("inf")) as scope:
                tasks.start_soon(_deadline, stop, scope)
                await enricher.serve(work, stop)
            done.set()
            await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()


async def _deadline(stop: anyio.Event, scope: anyio.CancelScope) -> None:
    # What is not acked by then is delivered to the next enricher: nothing is lost by leaving.
    await stop.wait()
    scope.deadline = anyio.current_time() + STOP_SECONDS
