"""Names for the frames of stacks, without holding anybody up.

    lines ask → memory answers, `pending` at the worst → a thread reads what is missing → later lines have the name

Reading a file may take a second, and a batch waits 20 ms at the most.  Whenever the thread has brought something,
`generation` grows, and lines that were kept with less are made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from typing import Final, Self

import anyio
import msgspec

from stella_enricher.symbols.resolver import Resolver
from stella_shared.events import BATCH_COUNTS, CALL_TYPES, NET_CONNECT, WHAT, NetConnect, StackFrame, unpack_batch
from stella_shared.symbols import Frame, Question

SETTLE_SECONDS: Final = 0.02
#: What was not found may be there later, in another process or installed by somebody.
RETRY_SECONDS: Final = 300.0
#: Processes that are asked for a file, for one build-id.
PIDS_MAX: Final = 4
#: Build-ids that wait for the thread; more are asked for again by a later batch.
WAITING_MAX: Final = 4096


class FrameNamer:
    """Names frames; without a resolver it says `disabled`.  A context manager: the thread ends with it."""

    def __init__(self, resolver: Resolver | None, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._resolver = resolver
        self._settle_seconds = settle_seconds
        #: Grows when something is known that was not known before.
        self.generation = 0
        self._missing: set[str] = set()
        self._asked: set[str] = set()
        self._work: queue.SimpleQueue[tuple[str, list[int]] | None] = queue.SimpleQueue()
        self._arrived = anyio.Event()
        self._is_slow = False
        #: When to ask again for what was not found, inf: nothing is to be asked again.
        self._retry_at = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self._resolver is not None:
            # A daemon: a file that takes its time must not hold up the end of the process.
            threading.Thread(target=self._read, name="symbols", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop = None
        self._work.put(None)

    def named(self, event: NetConnect) -> NetConnect:
        """Return the event with what is known about its frames now."""
        symbolizer = None
        frames = []
        for index, frame in enumerate(event.stack or []):
            if frame.build_id is None or frame.offset is None:
                frames.append(msgspec.structs.replace(frame, symbol_reason="no_build_id"))
            elif self._resolver is None:
                frames.append(msgspec.structs.replace(frame, symbol_reason="disabled"))
            else:
                # Every frame but the innermost is where a call returns to.
                answer = self._resolver.resolve(Question(frame.build_id, frame.offset, after_call=index > 0))
                if answer.reason == "pending":
                    self._missing.add(frame.build_id)
                if answer.symbol is not None:
                    symbolizer = answer.symbolizer
                frames.append(_with(frame, answer))
        return msgspec.structs.replace(event, stack=frames, symbolizer=symbolizer)

    async def settle(self, records: bytes) -> bool:
        """Ask for what the last lines missed; return whether some of it came, so that they are worth making anew.

        `records` are those of the batch, whose processes may have the files mapped; empty for another node's.
        Once it has waited in vain it waits no more until the thread has brought something: a slow disk costs
        one such wait, not one per batch.
        """
        if anyio.current_time() >= self._retry_at:
            self._retry_at = float("inf")
            self.generation += 1
        if not self._missing or self._resolver is None:
            return False
        missing, self._missing = self._missing, set()
        new = [build_id for build_id in sorted(missing - self._asked) if len(self._asked) < WAITING_MAX]
        pids = _pids(records, new) if new else {}
        for build_id in new:
            self._asked.add(build_id)
            self._work.put((build_id, pids.get(build_id, [])))
        if self._is_slow:
            return False
        before = self.generation
        with anyio.move_on_after(self._settle_seconds) as scope:
            while missing & self._asked:
                await self._arrived.wait()
        self._is_slow = scope.cancelled_caught
        return self.generation != before

    def stats(self) -> dict[str, int]:
        """Return counts for the heartbeat."""
        if self._resolver is None:
            return {}
        return {**self._resolver.stats(), "waiting": len(self._asked)}

    def _read(self) -> None:
        """Load what is asked for, one after the other.  Runs in the thread."""
        assert self._resolver is not None
        while (work := self._work.get()) is not None:
            build_id, pids = work
            reason = self._resolver.load(build_id, pids)
            loop = self._loop
            if loop is None:
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._has_arrived, build_id, reason)

    def _has_arrived(self, build_id: str, reason: str) -> None:
        self._asked.discard(build_id)
        self.generation += 1
        self._is_slow = False
        if reason:
            self._retry_at = min(self._retry_at, anyio.current_time() + RETRY_SECONDS)
        self._arrived.set()
        self._arrived = anyio.Event()


def _with(frame: StackFrame, answer: Frame) -> StackFrame:
    return msgspec.structs.replace(
        frame,
        symbol=answer.symbol,
        symbol_offset=answer.symbol_offset,
        symbol_source=answer.symbol_source,
        symbol_reason=answer.reason,
    )


def _pids(records: bytes, build_ids: list[str]) -> dict[str, list[int]]:
    """Return some processes of a batch in whose stacks each build-id stands."""
    if len(records) < BATCH_COUNTS.size:
        return {}
    batch = unpack_batch(records)
    raw = {build_id: bytes.fromhex(build_id) for build_id in build_ids}
    holders: dict[int, list[str]] = {}
    for index, what in enumerate(batch.whats):
        kind, call, _, _ = WHAT.unpack_from(what)
        if kind == NET_CONNECT and CALL_TYPES[call : call + 1] == (NET_CONNECT,):
            found = [build_id for build_id, data in raw.items() if data in what]
            if found:
                holders[index] = found
    out: dict[str, list[int]] = {}
    for _, _, who, what_index in batch.events:
        for build_id in holders.get(what_index, ()):
            pids = out.setdefault(build_id, [])
            pid = batch.whos[who][3]
            if pid not in pids and len(pids) < PIDS_MAX:
                pids.append(pid)
    return out
