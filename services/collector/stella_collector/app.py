"""The collector: kernel → batches → bus.  The only privileged process; it holds no keys.

    load and attach, or go on with what is ─> drain, again and again (draining.py) ─> spool ─> JetStream
                                              ↑ a timer that follows the ring's filling; nothing wakes us

Stopping is the same path once more: detach, drain until every number is settled, publish the final batch,
wait for its ack, and only then unpin the run.  Any other end leaves the probes attached and the ring as it is, for
the next collector (docs/decisions/0017-hitless-restart.md); a SIGUSR1 asks for that.
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

from stella_collector import coverage, powers, ring, targets
from stella_collector.draining import Draining
from stella_collector.heartbeat import beat_of
from stella_collector.journal import Journal
from stella_collector.kernel import BTF, OBJECT, Adopted, Kernel, sha256_of, shape_of
from stella_collector.libbpf import Libbpf
from stella_collector.objects import Pinned
from stella_collector.reading import Former
from stella_collector.runs import Left, Remembered, Runs, layout
from stella_collector.selected import Selected
from stella_collector.spool import SPOOL_BYTES, Spool
from stella_shared import VERSION, clock, config, lifecycle, subjects
from stella_shared.bus import Bus
from stella_shared.config import Signals, bus_url, bus_user, node_name
from stella_shared.errors import StellaError
from stella_shared.wire import LANE_KINDS, Closing

log = logging.getLogger(__name__)

FASTEST_SECONDS: Final = 0.0005
STEADY_SECONDS: Final = 0.005
SLOWEST_SECONDS: Final = 0.015
#: What a batch waits for between the two: the fewer there are, the less each event costs on its way.
BATCH_EVENTS: Final = 2500
IDLE_SECONDS: Final = 0.020
#: The least pause where a new program asks for a drain.
HASTE_SECONDS: Final = 0.005
#: A drain comes before this share of the ring is full at the rate of the last one.
RING_SHARE: Final = 0.25
QUIET_BATCH_SECONDS: Final = 1.0
COVERAGE_SECONDS: Final = 30.0
TARGETS_SECONDS: Final = 0.25
#: Notices bring new files at once; this finds what no notice told of, such as a process that was moved into a target.
SCAN_SECONDS: Final = 5.0
NODE_SCAN_SECONDS: Final = 30.0
COUNTS_SECONDS: Final = 1.0
#: Flushes that counters of a former collector have, at the steady pace, to find room in the ring.
FLUSHES_MAX: Final = 500


class Collector:
    """One run.  `serve` is the whole of it."""

    def __init__(
        self, signals: Signals, bus: Bus, kernel: Kernel, lib: Libbpf, runs: Runs, *, journal: Journal | None
    ) -> None:
        self.signals = signals
        self.kernel = kernel
        self.runs = runs
        self.bus = bus
        self.lib = lib
        self.node = node_name(signals)
        self.spool = Spool(bus, subjects.raw(self.node), SPOOL_BYTES)
        self.draining = Draining(
            kernel,
            self.spool,
            node=self.node,
            run=runs.current,
            journal=journal,
            coverage=self._coverage_of,
            stored=self._stored,
        )
        self.remembered: Remembered | None = None
        #: Whether this run is older than this process, and the batches that were published once more for it.
        self.adopted = False
        self.adopted_batches = 0
        self.rate = 0.0
        self.started_at = time.time()
        self.fixed = {
            "bpf_object_sha256": sha256_of(OBJECT),
            "btf_sha256": sha256_of(BTF),
            "config_sha256": config.digest(signals),
            "libbpf": lib.version,
            "reader": type(kernel.ring).__name__,
            "version": VERSION,
        }
        self.config_state: dict[str, str] = {"sha256": self.fixed["config_sha256"]}
        self.uring: dict[str, int] = {}
        self.targets: list[targets.Target] = []
        self.selected = Selected(signals)
        self._coverage = b""
        self._coverage_due = 0.0
        self._wake = anyio.Event()
        #: From here on nothing but `finish` may have a program take a number: the last drain settles them all.
        self._finishing = False
        #: Set once the files that are there are attached to: from then on the run may end.
        self._watched = anyio.Event()
        #: It is to end and leave the run to the next collector.
        self.leaves = False
        self._drops_told = 0
        self._drops_untold_since = 0.0

    # ---- the run

    async def begin(self, closings: list[Closing], remembered: Remembered) -> None:
        """Attach a run of its own."""
        self.draining.closings = closings
        self.look_for_targets()
        self.draining.begin()
        await anyio.to_thread.run_sync(self.kernel.attach_node)
        self.remembered = remembered
        self.kernel.binaries.tell_library(self.remember)
        remembered.attached = True
        self.remember()
        await self.watch_files()

    async def go_on(self, closings: list[Closing], remembered: Remembered) -> None:
        """Go on with the run of a former collector.  Raises `BrokenPromise` when it left what cannot be."""
        self.adopted = True
        self.remembered = remembered
        self.draining.closings = closings
        remembered.tries += 1
        self.remember()
        self.selected.go_on(remembered.selected)
        self.kernel.binaries.tell_library(self.remember)
        ring = self.kernel.ring
        self.adopted_batches = await self.draining.resume()
        log.info(
            "going on with run %s: %d batches once more, %d bytes (%.1f %% of the ring) not read yet",
            remembered.run,
            self.adopted_batches,
            ring.waiting(),
            100.0 * ring.waiting() / ring.size,
        )
        if self.draining.first_is_stored:
            self.runs.started(closings)  # they were told, and their collector died before it could forget them
        self.look_for_targets()
        self.uring = self.kernel.uring()
        # The gap of the probes in files shows: they are not attached from here until they are found.
        self.write_coverage()

    def remember(self) -> None:
        """Write down what this run's next collector has to know."""
        remembered = self.remembered
        if remembered is None or not self.runs.pinned:
            return
        remembered.libraries = list(self.kernel.libraries)
        remembered.links = self.kernel.links()
        remembered.states = self.kernel.states
        remembered.extras = self.kernel.extras
        remembered.counted = self.kernel.may_count()
        remembered.selected = self.selected.known()
        remembered.coverage = self._coverage.decode()
        self.runs.remember(remembered)

    def _coverage_of(self, number: int) -> bytes:
        now = time.monotonic()
        due = now >= self._coverage_due
        if due:
            self._coverage_due = now + COVERAGE_SECONDS
        return self._coverage if due or number == 0 else b""

    def _stored(self, number: int, final: bool) -> None:
        if self.remembered is not None and self.remembered.tries:
            self.remembered.tries = 0
            self.remember()
        if number == 0:
            self.runs.started(self.draining.closings)
        if final:
            self.runs.ended()

    # ---- the loop

    async def wake_at(self, stop: anyio.Event) -> None:
        """End the pause between two drains when it is time to stop."""
        await stop.wait()
        self._wake.set()

    async def drain_until(self, stop: anyio.Event) -> None:
        """Drain, at the pace of the ring, until `stop`."""
        draining, ring = self.draining, self.kernel.ring
        pause = STEADY_SECONDS
        told_at = counts_due = 0.0
        before = time.monotonic()
        while not (stop.is_set() and self._watched.is_set()):
            if self.spool.full:
                await anyio.sleep(STEADY_SECONDS)  # the ring is the buffer now, and counts what it cannot take
                continue
            now = time.monotonic()
            if now >= counts_due:
                counts_due = now + COUNTS_SECONDS
                self.kernel.binaries.flush()
            began = time.monotonic()
            drained, ledger = draining.drain()
            now = time.monotonic()
            held = draining.joined(ledger)
            if drained.count or held.lanes or now - told_at >= QUIET_BATCH_SECONDS:
                await draining.emit(held, drained.records)
                told_at = now
            else:
                draining.hold(held)
            draining.relieve()
            self._warn_of_drops(now)
            if drained.left:
                await anyio.lowlevel.checkpoint()
                continue
            elapsed, before = max(now - before, 1e-6), now
            self.rate += (drained.count / elapsed - self.rate) * min(1.0, elapsed)
            if drained.count:
                ring_seconds = ring.size * RING_SHARE / max(1, drained.span) * elapsed
                pause = min(max(STEADY_SECONDS, BATCH_EVENTS / max(self.rate, 1.0)), SLOWEST_SECONDS, ring_seconds)
                # From one drain to the next: what the batch took is part of it.
                pause = max(FASTEST_SECONDS, pause - (time.monotonic() - began))
            else:
                pause = min(IDLE_SECONDS, pause * 1.5)
            if stop.is_set():  # all that remains is to wait for what attaches
                await anyio.sleep(pause)
                continue
            with anyio.move_on_after(pause) as rest:
                await self._wake.wait()
            if not rest.cancelled_caught and not stop.is_set():
                # Programs may begin by the thousand: they hurry the drain, and do not cut it into crumbs.
                await anyio.sleep(max(0.0, min(pause, HASTE_SECONDS) - (time.monotonic() - now)))
                self._wake = anyio.Event()

    def _warn_of_drops(self, now: float) -> None:
        # At most once in five seconds, with all that were dropped since; `inf` tells the rest at the end.
        dropped = self.draining.lost.get("ring_full", 0)
        if dropped > self._drops_told and now - self._drops_untold_since >= 5.0:
            log.warning(
                "Ring buffer full, %d events dropped",
                dropped - self._drops_told,
                extra={"dropped": dropped - self._drops_told, "runbook": "issue-ring-buffer-overflow"},
            )
            self._drops_told, self._drops_untold_since = dropped, now

    async def finish(self) -> None:
        """Stop intake, settle every number, publish the final batch, wait for its ack; or leave all as it is."""
        self._finishing = True
        if self.leaves:
            log.info("run %s is left to the next collector", self.runs.current)
        else:
            await self.draining.finish()
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
            if not self._finishing:
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

    async def heed_leave(self, stop: anyio.Event) -> None:
        """End, and leave the run to the next collector, when asked to."""
        with anyio.open_signal_receiver(signal.SIGUSR1) as asked:
            async for _ in asked:
                self.leaves = self.draining.keeps
                stop.set()

    async def watch(self, bus: Bus, path: Path | None, stop: anyio.Event) -> None:
        """Attach to files, then follow what changes around us: targets, files, selectors, the configuration."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.selected.listen, bus)
            tasks.start_soon(self.heed_reloads, path)
            tasks.start_soon(self.heed_leave, stop)
            if not self._watched.is_set():
                await self.watch_files()
            tasks.start_soon(self.watch_surroundings)
            tasks.start_soon(self.heed_notices)

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
        self.fixed["config_sha256"] = asked
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
        changed = self.kernel.set_targets(found) or found != self.targets
        self.targets = found
        return changed

    def write_coverage(self) -> None:
        """Make the coverage document; when it differs it travels with the next batch."""
        document = coverage.document(
            self.signals,
            states=self.kernel.states,
            targets=self.targets,
            libraries=self.kernel.libraries,
            binaries=self.kernel.binaries.states(),
            uring=self.uring,
            **self.fixed,
        )
        if document != self._coverage:
            self._coverage = document
            self._coverage_due = 0.0
            self.remember()

    async def watch_files(self) -> None:
        """Attach to files; give up what attaching needs where nothing will be attached later."""
        if self.adopted:
            # Rows say something else from here on, so no counter may speak of what they were.
            for _ in range(FLUSHES_MAX):
                if not self.kernel.flush():
                    break
                await anyio.sleep(STEADY_SECONDS)
        await anyio.to_thread.run_sync(self.kernel.watch_files)
        powers.after_attaching(self.signals)
        self.uring = self.kernel.uring()
        self.write_coverage()
        self._watched.set()

    async def read_to_its_end(self, former: Remembered) -> None:
        """Read a run of former collectors that nobody can go on with: none of it is lost."""
        ended = anyio.Event()
        try:
            pinned = Pinned(self.lib, self.runs.folder(former.run))
            with Former(
                self.lib, pinned, former.lanes, former.ring_bytes, libraries=former.libraries, counted=former.counted
            ) as source:
                former.tries += 1
                self.runs.remember(former)
                draining = Draining(
                    source,
                    self.spool,
                    node=self.node,
                    run=former.run,
                    journal=self.runs.journal(self.lib, former.run, former.lanes),
                    coverage=lambda number: b"" if number else former.coverage.encode(),
                    stored=lambda _, final: ended.set() if final else None,
                )
                source.detach()
                await draining.resume()
                if not draining.ended:
                    await draining.finish()
                await ended.wait()
                self.runs.forget(former.run)
                log.info("run %s of a former collector is read to its end", former.run)
        except StellaError as e:
            log.error("run %s of a former collector cannot be read to its end: %s", former.run, e)


async def serve(signals: Signals, path: Path | None = None) -> None:
    """Run the collector until it is told to stop.  `path`: the configuration, which may change meanwhile."""
    lib = Libbpf()
    runs = Runs(signals)
    await runs.claim()
    shape = shape_of(signals, lib)
    left = runs.look(lib, lib.possible_cpus() * LANE_KINDS, shape, keeps=ring.can_keep())
    with lifecycle.stop_event() as stop, _kernel(signals, lib, runs, left) as kernel:
        account = bus_user(signals, "collector")
        async with Bus.connect(bus_url(signals), name="collector", account=account, tls=signals.bus.tls) as bus:
            if left.go_on is not None:
                journal: Journal | None = runs.journal(lib, left.go_on.run, kernel.lanes)
                remembered = left.go_on
            else:
                remembered = Remembered(runs.current, clock.boot_id(), shape, layout(), kernel.lanes, kernel.ring.size)
                journal = runs.open(kernel, lib, remembered)
            collector = Collector(signals, bus, kernel, lib, runs, journal=journal)
            begin = collector.go_on if left.go_on is not None else collector.begin
            drained = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collector.spool.run)
                await begin(left.closings, remembered)
                for former in left.finish:
                    tasks.start_soon(collector.read_to_its_end, former)
                tasks.start_soon(collector.watch, bus, path, stop)
                tasks.start_soon(collector.wake_at, stop)
                tasks.start_soon(lifecycle.beating, bus, lambda: beat_of(collector), drained)
                await collector.drain_until(stop)
                await collector.finish()
                drained.set()
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()


def _kernel(signals: Signals, lib: Libbpf, runs: Runs, left: Left) -> Kernel:
    """Return the programs of the run to go on with, else new ones."""
    known = left.go_on
    if known is None:
        return Kernel(signals, lib)
    runs.take(known.run)
    folder = runs.folder(known.run)
    pinned = Pinned(lib, folder)
    return Kernel(signals, lib, adopted=Adopted(folder, pinned, known.states, known.extras, known.libraries))
