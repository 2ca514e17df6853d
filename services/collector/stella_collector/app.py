"""The collector: kernel → batches → bus.  The only privileged process; it holds no keys.

    load and attach → drain → settle numbers → name → encode → spool → JetStream
                         ↑ a timer that follows the ring's filling; nothing wakes us, see bpf/stella.bpf.c

Stopping is the same path once more: detach, drain until every number is settled, publish the final batch,
wait for its ack, and only then unpin the counters.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from stella_collector import coverage, powers, targets
from stella_collector.accounting import Accountant, decode_counters, join
from stella_collector.kernel import BTF, OBJECT, Kernel, sha256_of
from stella_collector.libbpf import Libbpf
from stella_collector.naming import Namer
from stella_collector.ring import Drained
from stella_collector.runs import Runs
from stella_collector.selected import Selected
from stella_collector.spool import Spool
from stella_shared import VERSION, clock, config, lifecycle, metrics, privileges, raw_batches, subjects
from stella_shared.bus import Bus
from stella_shared.config import Signals, bus_url, bus_user, node_name
from stella_shared.errors import StellaError
from stella_shared.selectors import MAX_CONTAINERS, STALE_SECONDS
from stella_shared.wire import RAW_VERSION, Beat, Closing, Histogram, Ledger, RawBatch, encode_raw

log = logging.getLogger(__name__)

#: One batch holds at most this much of the ring: some 3,000 opens.
BATCH_BYTES: Final = 512 << 10
FASTEST_SECONDS: Final = 0.0005
STEADY_SECONDS: Final = 0.010
IDLE_SECONDS: Final = 0.020
#: The least pause where a new program asks for a drain.
HASTE_SECONDS: Final = 0.005
#: A drain comes before this share of the ring is full at the rate of the last one.
RING_SHARE: Final = 0.25
SPOOL_BYTES: Final = 64 << 20
QUIET_BATCH_SECONDS: Final = 1.0
COVERAGE_SECONDS: Final = 30.0
TARGETS_SECONDS: Final = 0.25
#: Notices bring new files at once; this finds what no notice told of, such as a process that was moved into a target.
SCAN_SECONDS: Final = 5.0
NODE_SCAN_SECONDS: Final = 30.0
COUNTS_SECONDS: Final = 1.0
MISSED_SECONDS: Final = 0.5
#: Programs that were running when they were detached have ended after this.
DETACHED_SECONDS: Final = 0.05


class Collector:
    """One run.  `serve` is the whole of it."""

    def __init__(self, signals: Signals, bus: Bus, kernel: Kernel, lib: Libbpf, runs: Runs) -> None:
        self.signals = signals
        self.kernel = kernel
        self.runs = runs
        self.bus = bus
        self.node = node_name(signals)
        self.boot_id = clock.boot_id()
        self.spool = Spool(bus, subjects.raw(self.node), SPOOL_BYTES)
        self.accountant = Accountant(kernel.lanes)
        self.namer = Namer(kernel.cgroup, kernel.program)
        self.closings: list[Closing] = []
        self.number = 0
        self.records = 0
        self.lost: dict[str, int] = {}
        self.filtered: dict[str, int] = {}
        self.fill = Histogram.with_bounds(1, 5, 10, 25, 50, 75, 80, 90, 95, 100)
        self.ring_percent = 0.0
        self.rate = 0.0
        self.started_at = time.time()
        self._lib = lib
        self._fixed = {
            "bpf_object_sha256": sha256_of(OBJECT),
            "btf_sha256": sha256_of(BTF),
            "config_sha256": config.digest(signals),
            "libbpf": lib.version,
            "reader": type(kernel.ring).__name__,
            "version": VERSION,
        }
        self.config_state: dict[str, str] = {"sha256": self._fixed["config_sha256"]}
        self.uring: dict[str, int] = {}
        self._coverage = b""
        self._coverage_due = 0.0
        self._targets: list[targets.Target] = []
        self.selected = Selected(signals)
        self._wake = anyio.Event()
        #: From here on nothing but `finish` may have a program take a number: the last drain settles them all.
        self._finishing = False
        self._held: Ledger | None = None
        self._missed = 0
        self._missed_at = 0.0
        self._drops_told = 0
        self._drops_untold_since = 0.0

    # ---- one batch

    def drain(self, *, last: bool = False) -> tuple[Drained, Ledger]:
        """Drain once and settle what came; with `last`, settle every number there is."""
        kernel = self.kernel
        # Losses before numbers: what is known to be lost is then among the numbers that were handed out.
        lost_before = decode_counters(kernel.counters())
        taken_before = decode_counters(kernel.counters())
        waiting = kernel.ring.waiting()
        self.ring_percent = 100.0 * waiting / kernel.ring.size
        self.fill.observe(self.ring_percent)
        drained = kernel.ring.drain(BATCH_BYTES)
        now_ns = clock.boottime_ns()
        ledger = self.accountant.settle(
            now_ns=now_ns,
            lost_before=lost_before,
            taken_before=taken_before,
            after=decode_counters(kernel.counters()),
            seen=kernel.ring.seen(),
            emptied=not drained.left,
            missed=self._missed_runs(now=last),
            last=last,
        )
        self._count(ledger, drained.count)
        return drained, ledger

    def _missed_runs(self, *, now: bool) -> int:
        # A system call per program: once in a while is enough, the total is what counts.
        at = time.monotonic()
        if now or at - self._missed_at > MISSED_SECONDS:
            self._missed_at, self._missed = at, self.kernel.missed()
        return self._missed

    def _count(self, ledger: Ledger, records: int) -> None:
        self.records += records
        for cause, n in ledger.lost.items():
            self.lost[cause] = self.lost.get(cause, 0) + n
        for cause, n in ledger.filtered.items():
            self.filtered[cause] = self.filtered.get(cause, 0) + n

    async def emit(self, ledger: Ledger, records: bytes, *, final: bool = False) -> None:
        """Name what is in one batch, encode it and put it into the spool."""
        distinct = raw_batches.names(records)
        await self.namer.settle(distinct)
        cgroups, programs = self.namer.names(distinct)
        now = time.monotonic()
        due = now >= self._coverage_due
        if due:
            self._coverage_due = now + COVERAGE_SECONDS
        first = self.number == 0
        batch = RawBatch(
            version=RAW_VERSION,
            node=self.node,
            boot_id=self.boot_id,
            run=self.runs.current,
            number=self.number,
            ledger=ledger,
            coverage=self._coverage if due or first else b"",
            final=final,
            closings=self.closings if first else [],
            libraries=list(self.kernel.libraries),
            records=records,
            cgroups=cgroups,
            programs=programs,
        )
        done = None
        if final:
            done = self.runs.ended
        elif first:
            done = lambda: self.runs.started(self.closings)  # noqa: E731
        self.spool.put(f"{self.runs.current}.{self.number}", encode_raw(batch), done)
        self.number += 1

    # ---- the loop

    async def wake_at(self, stop: anyio.Event) -> None:
        """End the pause between two drains when it is time to stop."""
        await stop.wait()
        self._wake.set()

    async def drain_until(self, stop: anyio.Event) -> None:
        """Drain, at the pace of the ring, until `stop`."""
        pause = STEADY_SECONDS
        told_at = counts_due = 0.0
        before = time.monotonic()
        while not stop.is_set():
            if self.spool.full:
                await anyio.sleep(STEADY_SECONDS)  # the ring is the buffer now, and counts what it cannot take
                continue
            now = time.monotonic()
            if now >= counts_due:
                counts_due = now + COUNTS_SECONDS
                self.kernel.binaries.flush()
            drained, ledger = self.drain()
            now = time.monotonic()
            held = self._held_back(ledger)
            if drained.count or held.lanes or now - told_at >= QUIET_BATCH_SECONDS:
                await self.emit(held, drained.records)
                self._held = None
                told_at = now
            else:
                self._held = held
            self._warn_of_drops(now)
            if drained.left:
                await anyio.lowlevel.checkpoint()
                continue
            elapsed, before = max(now - before, 1e-6), now
            self.rate += (drained.count / elapsed - self.rate) * min(1.0, elapsed)
            if drained.count:
                ring_seconds = self.kernel.ring.size * RING_SHARE / (len(drained.records) / elapsed)
                pause = min(STEADY_SECONDS, max(FASTEST_SECONDS, ring_seconds))
            else:
                pause = min(IDLE_SECONDS, pause * 1.5)
            with anyio.move_on_after(pause) as rest:
                await self._wake.wait()
            if not rest.cancelled_caught and not stop.is_set():
                # Programs may begin by the thousand: they hurry the drain, and do not cut it into crumbs.
                await anyio.sleep(max(0.0, min(pause, HASTE_SECONDS) - (time.monotonic() - now)))
                self._wake = anyio.Event()

    def _held_back(self, ledger: Ledger) -> Ledger:
        # What the filters counted while nothing was recorded is told with the next batch, not in one of its own.
        return ledger if self._held is None else join(self._held, ledger)

    def _warn_of_drops(self, now: float) -> None:
        # At most once in five seconds, with all that were dropped since; `inf` tells the rest at the end.
        dropped = self.lost.get("ring_full", 0)
        if dropped > self._drops_told and now - self._drops_untold_since >= 5.0:
            log.warning(
                "Ring buffer full, %d events dropped",
                dropped - self._drops_told,
                extra={"dropped": dropped - self._drops_told, "runbook": "issue-ring-buffer-overflow"},
            )
            self._drops_told, self._drops_untold_since = dropped, now

    async def finish(self) -> None:
        """Stop intake, settle every number, publish the final batch, wait for its ack."""
        self._finishing = True
        await anyio.to_thread.run_sync(self.kernel.detach)
        await anyio.sleep(DETACHED_SECONDS)
        final = False
        while not final:
            counts_left = self.kernel.binaries.flush()
            final = not counts_left and self.kernel.ring.waiting() <= BATCH_BYTES // 2
            drained, ledger = self.drain(last=final)
            await self.emit(self._held_back(ledger), drained.records, final=final)
            self._held = None
        self._warn_of_drops(float("inf"))
        with anyio.move_on_after(15.0) as scope:
            await self.spool.wait_empty()
        if scope.cancelled_caught:
            log.error("%d bytes of batches could not be published before the deadline", self.spool.bytes)

    async def watch_surroundings(self) -> None:
        """Follow targets and files as they come and go; every change is a new coverage document."""
        binaries = self.kernel.binaries
        scan_due = 0.0
        while True:
            with anyio.move_on_after(TARGETS_SECONDS):
                await self.selected.changed.wait()
            self.kernel.tell_limits()
            ways = self.kernel.uring()
            newly = {what for what, count in ways.items() if count} != {w for w, count in self.uring.items() if count}
            self.uring = ways
            wanted = targets.any_wanted(self.signals)
            moved = self.look_for_targets() if wanted else False
            changed = moved
            changed |= await anyio.to_thread.run_sync(binaries.select, self.selected.images())
            if moved or time.monotonic() >= scan_due:
                changed |= await anyio.to_thread.run_sync(binaries.scan, self.kernel.target_ids)
                scan_due = time.monotonic() + (SCAN_SECONDS if wanted else NODE_SCAN_SECONDS)
            else:
                changed |= await anyio.to_thread.run_sync(binaries.recheck)
            if changed or newly:
                self.write_coverage()

    async def heed_notices(self) -> None:
        """Look at processes as the kernel tells that they have begun to run a file."""
        notices = self.kernel.binaries.notices
        if notices is None:
            return
        while True:
            await anyio.wait_readable(notices.fd)
            # A program that has just begun may have ended by the next drain, and its file is asked about then.
            self._wake.set()
            if await anyio.to_thread.run_sync(self.kernel.binaries.look_at_notices):
                self.write_coverage()

    async def heed_reloads(self, path: Path | None) -> None:
        """Take up the configuration at `path` whenever a hang-up says that it has changed."""
        with anyio.open_signal_receiver(signal.SIGHUP) as hangups:
            async for _ in hangups:
                self.reload(path)

    def reload(self, path: Path | None) -> None:
        """Take up the configuration at `path`; one that cannot be is refused, and the old one holds."""
        try:
            signals = config.load(path, os.environ)
        except StellaError as e:
            self.config_state = {**self.config_state, "refused": str(e), "refused_sha256": ""}
            return
        asked = config.digest(signals)
        try:
            self.kernel.apply(signals)
        except StellaError as e:
            log.error("the changed configuration is refused: %s", e)
            self.config_state = {**self.config_state, "refused": str(e), "refused_sha256": asked}
            return
        self.signals = signals
        self.selected.ask(signals)
        self._fixed["config_sha256"] = asked
        self.config_state = {"sha256": asked}
        logging.getLogger().setLevel(signals.logging.level.upper())
        self.look_for_targets()
        self.write_coverage()
        log.info("the changed configuration is taken up")

    def look_for_targets(self) -> bool:
        """Resolve the targets anew; return whether that changed anything."""
        # Named first: a cgroup that is made between the two is seen by the kernel.
        selected = self.selected.containers()
        self.kernel.name_targets(selected)
        found = targets.resolve(self.signals, selected)
        changed = self.kernel.set_targets(found) or found != self._targets
        self._targets = found
        return changed

    def write_coverage(self) -> None:
        """Make the coverage document; when it differs it travels with the next batch."""
        document = coverage.document(
            self.signals,
            states=self.kernel.states,
            targets=self._targets,
            libraries=self.kernel.libraries,
            binaries=self.kernel.binaries.states(),
            uring=self.uring,
            **self._fixed,
        )
        if document != self._coverage:
            self._coverage = document
            self._coverage_due = 0.0

    def beat(self) -> Beat:
        """Return this service's heartbeat."""
        missing = [s for s in self.kernel.states if s.wanted and not s.attached and s.scope == "node"]
        state, reason = "ok", ""
        if self.spool.last_error:
            state, reason = "degraded", f"batches wait in memory: {self.spool.last_error}"
        elif not any(s.attached for s in self.kernel.states):
            state, reason = "failed", "no probe is attached"
        elif [s for s in missing if s.kernel and not s.reason.startswith("no libssl")]:
            state, reason = "degraded", "; ".join(f"{s.name}: {s.reason}" for s in missing)
        elif self.selected.wanted and not self.selected.heard and time.time() - self.started_at > STALE_SECONDS:
            state, reason = "degraded", "no enricher says which containers the selectors match"
        elif self.selected.truncated:
            state, reason = (
                "degraded",
                f"more than {MAX_CONTAINERS} containers match the selectors: not all are watched",
            )
        dropped = {f"stellaops_signals_drops_total{{cause={c}}}": float(n) for c, n in self.lost.items()}
        filtered = {f"stellaops_signals_filtered_total{{cause={c}}}": float(n) for c, n in self.filtered.items()}
        attached = {
            f"stellaops_signals_probe_attached{{probe={s.name}}}": float(s.attached) for s in self.kernel.states
        }
        unnamed = {metrics.key(metrics.NAMES_MISSING_TOTAL, reason=r): float(n) for r, n in self.namer.missing.items()}
        return Beat(
            service="collector",
            instance=f"{self.node}",
            node=self.node,
            pid=os.getpid(),
            version=VERSION,
            at=time.time(),
            started_at=self.started_at,
            state=state,
            reason=reason,
            metrics={
                "stellaops_signals_events_rate": round(self.rate, 1),
                "stellaops_signals_ringbuf_usage": round(self.ring_percent, 2),
                "stellaops_signals_ringbuf_bytes": float(self.kernel.ring.size),
                "stellaops_signals_batches_total": float(self.number),
                "stellaops_signals_spool_bytes": float(self.spool.bytes),
                "stellaops_signals_publish_retries_total": float(self.spool.retries),
                **dropped,
                **filtered,
                **attached,
                **unnamed,
            },
            detail={
                "run": self.runs.current,
                "boot_id": self.boot_id,
                "config": self.config_state,
                "records": self.records,
                "batches": self.number,
                "published": self.spool.published,
                "spool_bytes": self.spool.bytes,
                "spool_max_bytes": SPOOL_BYTES,
                "reader": self._fixed["reader"],
                "libbpf": self._lib.version,
                "libraries": self.kernel.libraries,
                "binaries": msgspec.to_builtins(self.kernel.binaries.states()),
                "privileges": privileges.left(),
                "io_uring": self.uring,
                "counters_pinned": self.runs.pinned,
                "counters_pin_reason": self.runs.pin_reason,
                "names": {**self.namer.stats(), "missing": self.namer.missing},
                "lost": self.lost,
                "filtered": self.filtered,
                "targets": [
                    {"asked": t.asked, "id": t.id} | ({"container": t.container} if t.container else {})
                    for t in self._targets
                ],
                "probes": [
                    {
                        "name": s.name,
                        "attach_point": s.attach_point,
                        "wanted": s.wanted,
                        "attached": s.attached,
                        "scope": s.scope,
                        "reason": s.reason,
                        "fix": s.fix,
                    }
                    for s in self.kernel.states
                ],
            },
        )


async def serve(signals: Signals, path: Path | None = None) -> None:
    """Run the collector until it is told to stop.  `path`: the configuration, which may change meanwhile."""
    lib = Libbpf()
    runs = Runs(signals)
    with lifecycle.stop_event() as stop, Kernel(signals, lib) as kernel:
        account = bus_user(signals, "collector")
        async with Bus.connect(bus_url(signals), name="collector", account=account) as bus:
            collector = Collector(signals, bus, kernel, lib, runs)
            collector.closings = runs.closings(lib, kernel.lanes)
            runs.open(kernel)
            collector.look_for_targets()
            collector.accountant.begin(clock.boottime_ns())
            await anyio.to_thread.run_sync(kernel.attach)
            powers.after_attaching(signals)
            collector.uring = kernel.uring()
            collector.write_coverage()
            drained = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collector.spool.run)
                tasks.start_soon(collector.selected.listen, bus)
                tasks.start_soon(collector.watch_surroundings)
                tasks.start_soon(collector.heed_notices)
                tasks.start_soon(collector.wake_at, stop)
                tasks.start_soon(collector.heed_reloads, path)
                tasks.start_soon(lifecycle.beating, bus, collector.beat, drained)
                await collector.drain_until(stop)
                await collector.finish()
                drained.set()
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()
