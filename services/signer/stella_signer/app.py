"""The signer: from the bus to signed chunks.

    bus.work ─▶ Intake (parts → batches) ─▶ ChunkStore.commit (durable) ─▶ ack
                Patience (what is waited for no longer) ─▶ steps ┘     └─▶ close by size, age, stop ─▶ sign

One task does all of this in order; file, hash and signature work runs in a worker thread so that heartbeats
and the bus go on.  While the disk refuses, nothing is acknowledged, so nothing is lost: the bus keeps it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from stella_shared import VERSION, allocator, clock, config, lifecycle, log, metrics, privileges, subjects, system_calls
from stella_shared.bus import Bus, Message, Work
from stella_shared.config import Signals
from stella_shared.errors import BrokenPromise, StellaError, TryAgain
from stella_shared.evidence import keys, notes
from stella_shared.evidence.export import Times
from stella_shared.evidence.store import places
from stella_shared.wire import Beat, Histogram, decode_head
from stella_signer import errands
from stella_signer.chunks import ChunkStore
from stella_signer.intake import Batch, Intake, Verdict
from stella_signer.outbound import Outbound
from stella_signer.patience import Patience, at_the_end
from stella_signer.signing import LocalKey
from stella_signer.steps import Step

SERVICE: Final = "signer"
#: A group commit is made at least this often while batches come.
LINGER_SECONDS: Final = 0.03
TICK_SECONDS: Final = 0.25
#: Where nothing is waited for; whoever stops it does not wait for the end of that.
QUIET_TICK_SECONDS: Final = 1.0
#: How often the bus is asked how far behind this is, and where it last was not.
LAG_SECONDS: Final = 1.0
QUIET_LAG_SECONDS: Final = 5.0
STOP_SECONDS: Final = 20.0
RETRY_SECONDS: Final = 1.0
#: How long a signer waits for the one before it, which may be stopping, to let go of the chain.
LOCK_SECONDS: Final = 30.0
NOTES_SECONDS: Final = 1.0
#: With nothing on the bus for this long, a batch that is missing does not come any more.
QUIET_SECONDS: Final = 3.0
MAX_MESSAGES: Final = 1024
#: A commit is not put off when this much is in memory.
COMMIT_BYTES: Final = 16 << 20
MAX_ACK_PENDING: Final = subjects.MAX_ACK_PENDING * 4
#: Messages that wait here while a group is committed.
AHEAD: Final = 256
#: Batches whose way to a signature is timed; at the usual pace of commits, hours.
_MAX_UNSIGNED: Final = 1 << 20
#: How many events stand for a batch where their way to the disk is timed.
AGE_SAMPLES: Final = 5
#: A chunk with more coverage documents than this is closed early.
MAX_COVERAGES: Final = 256


T = TypeVar("T")


def _utc_now() -> str:
    return clock.utc_text(time.time_ns())


class Signer:
    """One node's signer: the state that its tasks share."""

    def __init__(self, signals: Signals, instance: str) -> None:
        self._signals = signals
        self._node = config.node_name(signals)
        self._instance = instance or self._node
        self._log = log.setup(SERVICE, signals.logging)
        self._alone = anyio.Lock()
        self._outbound = Outbound(signals, self._log, self._durable)
        self._key: LocalKey | None = None
        self._started_at = time.time()
        self._boot_id = clock.boot_id()
        self._state = "starting"
        self._reason = ""
        self._last_error = ""
        self._patience = Patience()
        self._latency = Histogram.with_bounds(*metrics.LATENCY_BOUNDS_SECONDS)
        self._signed_latency = Histogram.with_bounds(*metrics.SIGNED_BOUNDS_SECONDS)
        #: (chunk, drained at, lines) of what is durable and not signed yet.
        self._unsigned: deque[tuple[int, int, int]] = deque(maxlen=_MAX_UNSIGNED)
        self._metrics: dict[str, float] = {}
        self._detail: dict[str, object] = {}
        self._lines = self._batches = self._refused = self._repeated = 0
        self._found_lost: dict[str, int] = {}
        self._bus_lag = 0
        self._stop_by = float("inf")
        #: The wait for messages; cancelled when it is time to stop.
        self._waiting: anyio.CancelScope | None = None
        self._quiet_since = float("inf")
        self._opened_at = 0.0
        self._looked_at = 0.0

    # -- life ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until told to stop; then finish what is in flight, close, sign and return."""
        with lifecycle.stop_event() as stop:
            async with AsyncExitStack() as stack:
                bus = await self._connected(stack, stop)
                if bus is None:
                    return
                done = anyio.Event()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lifecycle.beating, bus, self._beat, done)
                    tasks.start_soon(self._mark_stop, stop)
                    try:
                        await self._serve(bus, stop)
                    finally:
                        done.set()
                        stop.set()

    async def _connected(self, stack: AsyncExitStack, stop: anyio.Event) -> Bus | None:
        """Return the bus, or None when told to stop before it answered."""
        account = config.bus_user(self._signals, SERVICE)
        url = config.bus_url(self._signals)
        for attempt in range(30):
            connecting = Bus.connect(
                url, name=SERVICE, account=account, tls=self._signals.bus.tls, patience_seconds=RETRY_SECONDS
            )
            try:
                return await stack.enter_async_context(connecting)
            except TryAgain:
                if stop.is_set():
                    return None
                if attempt == 29:
                    raise
        return None

    async def _mark_stop(self, stop: anyio.Event) -> None:
        await stop.wait()
        self._stop_by = anyio.current_time() + STOP_SECONDS
        if self._waiting is not None:
            self._waiting.cancel()

    async def _serve(self, bus: Bus, stop: anyio.Event) -> None:
        store = await self._open_store(stop)
        if store is None:
            return
        intake: Intake[Message] = Intake(self._node, store.is_settled, store.boot_of)
        try:
            async with (
                bus.work(
                    subjects.ENRICHED_STREAM,
                    subjects.SIGNER_DURABLE,
                    filter_subject=subjects.enriched(self._node, "*"),
                    max_ack_pending=MAX_ACK_PENDING,
                    ahead=AHEAD,
                ) as work,
                self._outbound.working(store),
            ):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch_lag, work)
                    await self._keep(bus, work, store, intake, stop)
                    tasks.cancel_scope.cancel()
                await self._durable(functools.partial(store.close, "stop"))
            self._log.info("stopped", extra={"chunks_signed": store.chunks_signed})
        finally:
            self._tell(store, intake)
            store.release()

    async def _open_store(self, stop: anyio.Event) -> ChunkStore | None:
        where = places(self._signals)
        signing = self._signals.signing
        if not signing.enabled:
            self._log.warning("signing is switched off: chunks are closed, and nothing vouches for them")
        elif not self._outbound.remote:
            self._key = await self._durable(lambda: LocalKey.load(where.state))
            self._detail["key_hint"] = keys.key_hint(self._key.key_id)
        key, remote = self._key, self._outbound.remote
        opened: list[ChunkStore] = []

        def work() -> None:
            opened.append(ChunkStore.open(where, key, version=VERSION, now=_utc_now, remote=remote))

        wait_until = anyio.current_time() + LOCK_SECONDS
        while not opened:
            try:
                await self._durable(work)
            except TryAgain as e:
                self._fail(str(e))
                if stop.is_set():
                    return None
                if anyio.current_time() > wait_until:
                    raise
                await anyio.sleep(RETRY_SECONDS)
        store = opened[0]
        if store.commits_gone:
            self._log.error(
                "the disk lost commits that it had confirmed; their batches will show as missing",
                extra={"commits": store.commits_gone},
            )
        self._opened_at = anyio.current_time()
        self._log.info("chain opened", extra={"chain": store.chain_id, "chunk": store.index})
        return store

    # -- the work --------------------------------------------------------------------------------------

    async def _keep(self, bus: Bus, work: Work, store: ChunkStore, intake: Intake[Message], stop: anyio.Event) -> None:
        """Take messages, make them durable, acknowledge them; until stopped and drained, or out of time."""
        # An idle chunk is closed on time, too.
        longest = self._signals.rotation.max_age_hours * 3600 / 2
        while True:
            self._tell(store, intake)
            messages: list[Message] = []
            quiet = not (stop.is_set() or intake.incomplete or store.account.early())
            with anyio.move_on_after(min(longest, QUIET_TICK_SECONDS if quiet else TICK_SECONDS)) as self._waiting:
                messages = await work.get(MAX_MESSAGES, LINGER_SECONDS)
            for message in messages:
                await self._offer(intake, message)
                if intake.bytes >= COMMIT_BYTES:
                    await self._commit(store, intake, [])
            steps = self._patience.due(store.account, anyio.current_time())
            if intake.complete or steps:
                await self._commit(store, intake, steps)
            if reason := self._rotation(store):
                await self._durable(functools.partial(store.close, reason))
                self._opened_at = anyio.current_time()
            if stop.is_set() and (
                anyio.current_time() > self._stop_by or await self._drained(bus, work, store, intake)
            ):
                while last := at_the_end(store.account):
                    await self._commit(store, intake, last)
                return

    async def _offer(self, intake: Intake[Message], message: Message) -> None:
        try:
            verdict = intake.offer(decode_head(message.head), message.data, message)
        except BrokenPromise as e:
            verdict, intake.last_refusal = Verdict.REFUSED, f"{message.subject}: {e}"
        if verdict is Verdict.REPEATED:
            self._repeated += 1
            await message.ack()
        elif verdict is Verdict.REFUSED:
            self._refused += 1
            self._last_error = intake.last_refusal
            self._log.error("refused", extra={"reason": intake.last_refusal})
            await message.term()

    async def _commit(self, store: ChunkStore, intake: Intake[Message], steps: list[Step]) -> None:
        """Make all complete batches durable, then acknowledge them."""
        batches = intake.take()
        # Batches first: one that arrives just in time is not given up.
        told: list[Step] = [batch.step for batch in batches]
        before = dict(store.account.found_lost)
        await self._durable(functools.partial(store.commit, [*told, *steps], [batch.body for batch in batches]))
        for cause, count in store.account.found_lost.items():
            self._found_lost[cause] = self._found_lost.get(cause, 0) + count - before.get(cause, 0)
        self._observe(batches, store.index)
        for step in steps:
            self._log.warning("waited long enough", extra={"step": repr(step)})
        for batch in batches:
            for message in batch.handles:
                await message.ack()
        for message in intake.drop_settled():
            await message.ack()

    def _observe(self, batches: list[Batch[Message]], index: int) -> None:
        now = clock.boottime_ns()
        self._batches += len(batches)
        for batch in batches:
            self._lines += batch.step.lines
            if batch.step.lines and batch.drained_ns and batch.step.boot_id == self._boot_id:
                # Its events came about evenly between the first one and the drain.
                oldest, newest = batch.oldest_ns or batch.drained_ns, batch.drained_ns
                weight = max(1, batch.step.lines // AGE_SAMPLES)
                for sample in range(AGE_SAMPLES):
                    came = oldest + max(0, newest - oldest) * sample // AGE_SAMPLES
                    self._latency.observe(max(0, now - came) / 1e9, weight)
                self._unsigned.append((index, batch.drained_ns, batch.step.lines))

    def _observe_signed(self, store: ChunkStore) -> None:
        """Note how long the lines of newly signed chunks have waited for that."""
        now = clock.boottime_ns()
        while self._unsigned and self._unsigned[0][0] <= store.last_signed:
            _, drained_ns, lines = self._unsigned.popleft()
            self._signed_latency.observe(max(0, now - drained_ns) / 1e9, lines)

    def _rotation(self, store: ChunkStore) -> str:
        """Return why the open chunk must close now, or ""."""
        if store.account.early():
            return ""
        if store.recovering:
            return "recovery"
        rotation = self._signals.rotation
        if max(store.bytes, store.journal_bytes) >= rotation.max_size_mb * (1 << 20):
            return "size"
        if store.account.coverages > MAX_COVERAGES:
            return "size"
        if anyio.current_time() - self._opened_at >= rotation.max_age_hours * 3600:
            return "age"
        if anyio.current_time() - self._looked_at >= NOTES_SECONDS:
            self._looked_at = anyio.current_time()
            if any(note.kind in notes.URGENT for note in store.waiting_notes()):
                return "note"
        return ""

    async def _drained(self, bus: Bus, work: Work, store: ChunkStore, intake: Intake[Message]) -> bool:
        """Return whether every run has ended and nothing is on its way; or whether what is missing cannot come."""
        missing = bool(store.account.holes() or intake.incomplete)
        if work.waiting or (not missing and (store.account.live() or store.account.early())):
            self._quiet_since = float("inf")
            return False
        try:
            done = await work.pending() == (0, 0)
            if done and not missing:
                return True
            # A raw batch stays on the bus until all its parts are stored, so none is in an enricher's hands either.
            if not done or (await bus.lag(subjects.RAW_STREAM, subjects.RAW_DURABLE)).bytes:
                self._quiet_since = float("inf")
                return False
        except TryAgain:
            return False
        self._quiet_since = min(self._quiet_since, anyio.current_time())
        return anyio.current_time() - self._quiet_since >= QUIET_SECONDS

    async def _durable(self, work: Callable[[], T]) -> T:
        """Do file work in a thread, one at a time; while the disk refuses, say so and try again.

        Raises `TryAgain` when it still refuses as the time to stop runs out.
        """
        while True:
            try:
                async with self._alone:
                    result = await anyio.to_thread.run_sync(work)
            except OSError as e:
                self._fail(f"{e.filename or 'evidence'}: {e.strerror}")
                if anyio.current_time() > self._stop_by:
                    raise TryAgain(f"stopped while the disk refused: {e}") from None
                await anyio.sleep(RETRY_SECONDS)
            else:
                if self._state != "ok":
                    self._log.info("writing evidence")
                self._state, self._reason = "ok", ""
                return result

    def _fail(self, reason: str) -> None:
        if self._reason != reason:
            self._log.error("cannot write evidence; nothing is acknowledged meanwhile", extra={"reason": reason})
        self._state, self._reason, self._last_error = "failed", reason, reason

    # -- what others see -------------------------------------------------------------------------------

    async def _watch_lag(self, work: Work) -> None:
        while True:
            try:
                waiting, delivered = await work.pending()
                self._bus_lag = waiting + delivered
            except TryAgain:
                pass
            # A node without work is one batch behind at most, its heartbeat.
            await anyio.sleep(LAG_SECONDS if self._bus_lag > 1 else QUIET_LAG_SECONDS)

    def _tell(self, store: ChunkStore, intake: Intake[Message]) -> None:
        """Note what the next heartbeat says; called only while no thread works on the store."""
        self._observe_signed(store)
        self._metrics = {
            metrics.CHUNKS_SIGNED: store.chunks_signed,
            metrics.LINES_TOTAL: self._lines,
            metrics.BATCHES_TOTAL: self._batches,
            **{metrics.key(metrics.DROPS_TOTAL, cause=c): n for c, n in self._found_lost.items()},
            **self._outbound.metrics(),
        }
        self._detail |= {
            "chain_id": store.chain_id,
            "index": store.index,
            "open_lines": store.lines,
            "open_bytes": store.bytes,
            "last_statement_sha256": store.last_statement_sha256,
            "waiting_for_earlier": store.account.early(),
            "incomplete": intake.incomplete,
            "repeated": self._repeated,
            "refused": self._refused,
        }

    def _beat(self) -> Beat:
        outside = self._outbound.reason()
        # The evidence is safe while the way out is blocked: that is less than well, and no failure.
        state = "degraded" if outside and self._state == "ok" else self._state
        return Beat(
            SERVICE,
            self._instance,
            self._node,
            os.getpid(),
            VERSION,
            time.time(),
            self._started_at,
            state,
            self._reason or outside,
            {**self._metrics, metrics.SIGN_LAG_BATCHES: self._bus_lag},
            {metrics.DURABLE_LATENCY_SECONDS: self._latency, metrics.SIGNED_LATENCY_SECONDS: self._signed_latency},
            {
                **self._detail,
                "signing": self._outbound.describe(self._key),
                "last_error": self._last_error,
                "privileges": privileges.left(),
            },
        )


def main(argv: list[str] | None = None) -> int:
    """Run the signer of a node: `--config FILE [--instance NAME]`.  Returns the exit code.

    `--once` and `--manifest` do one errand for a command and end.
    """
    parser = argparse.ArgumentParser(prog="stella-signer", description="Turns enriched events into signed chunks.")
    parser.add_argument("--config", type=Path, help="configuration file (defaults without one)")
    parser.add_argument("--instance", default="", help="name in heartbeats (the node's name by default)")
    parser.add_argument("--once", action="store_true", help="recover, record waiting notes, sign, and end")
    parser.add_argument("--manifest", action="store_true", help="print the signed manifest of an export, and end")
    parser.add_argument("--since", default="", metavar="TIME", help="of the export: from this time on")
    parser.add_argument("--until", default="", metavar="TIME", help="of the export: before this time")
    parser.add_argument("--proofs", action="store_true", help="of the export: with the proofs of logs")
    options = parser.parse_args(argv)
    try:
        signals = config.load(options.config, os.environ)
        privileges.refuse(system_calls.REFUSED, switched_on=signals.syscall_filter)
        if options.once:
            errands.record_notes(signals)
            return 0
        if options.manifest:
            asked = Times(options.since, options.until)
            sys.stdout.buffer.write(errands.sign_manifest(signals, asked, proofs=options.proofs))
            return 0
        allocator.keep_large_blocks()
        anyio.run(Signer(signals, options.instance).run)
    except BaseExceptionGroup as group:
        found = group.subgroup(StellaError)
        first: BaseException | None = found
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, StellaError):
            raise
        return _say(first)
    except StellaError as e:
        return _say(e)
    return 0


def _say(error: StellaError) -> int:
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    sys.stderr.write(f"stella-signer: {error}{hint}\n")
    return error.exit_code
