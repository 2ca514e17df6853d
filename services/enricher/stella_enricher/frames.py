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
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import anyio
import msgspec

from stella_enricher.symbols.demangling import Demangler
from stella_enricher.symbols.resolver import Resolver
from stella_shared.events import FileOpen, FunctionCall, NetConnect, ProcessExec, StackFrame
from stella_shared.kernel_records import CALL_TYPES, FILE_OPEN, FUNCTION_CALL, NET_CONNECT, PROCESS_EXEC
from stella_shared.raw_batches import BATCH_COUNTS, WHAT, names, unpack_batch
from stella_shared.symbols import Frame, Question
from stella_shared.wire import Program

WithStack = FileOpen | ProcessExec | NetConnect
_HAVE_STACKS: Final = (FILE_OPEN, PROCESS_EXEC, NET_CONNECT, FUNCTION_CALL)
SETTLE_SECONDS: Final = 0.02
#: What was not found may be there later, in another process or installed by somebody.
RETRY_SECONDS: Final = 300.0
#: Processes that are asked for a file, for one build-id.
PIDS_MAX: Final = 4
#: Build-ids that wait for the thread; more are asked for again by a later batch.
WAITING_MAX: Final = 4096
#: Programs whose tables were read ahead, and that are not read again for it.
AHEAD_MAX: Final = 16_384


class FrameNamer:
    """Names frames; without a resolver it says `disabled`.  A context manager: the thread ends with it."""

    def __init__(
        self, resolver: Resolver | None, *, settle_seconds: float = SETTLE_SECONDS, ahead: bool = False
    ) -> None:
        """`ahead`: read the table of every program at its first event, while its file can be reached."""
        self._resolver = resolver
        self._settle_seconds = settle_seconds
        self._ahead = ahead and resolver is not None
        self._read_ahead: set[str] = set()
        self._runners: dict[str, list[int]] = {}
        #: Grows when something is known that was not known before.
        self.generation = 0
        self._demangler = Demangler()
        self._missing: set[str] = set()
        self._asked: set[str] = set()
        #: Where the record says that the file of a build-id was, as its process saw it: only a hint.
        self._hints: dict[str, Path] = {}
        self._work: queue.SimpleQueue[tuple[str, list[int], Path | None] | None] = queue.SimpleQueue()
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
        self._demangler.close()
        self._work.put(None)

    def named(self, event: WithStack) -> WithStack:
        """Return the event with what is known about its frames now."""
        frames, symbolizer = self._named(event.stack or [])
        return msgspec.structs.replace(event, stack=frames, symbolizer=symbolizer)

    def named_function(self, event: FunctionCall) -> FunctionCall:
        """Return the event with its symbol demangled and its frames named, as far as that is known now."""
        if event.build_id is not None and event.binary.startswith("/") and len(self._hints) < WAITING_MAX:
            self._hints[event.build_id] = Path(event.binary)
        frames, symbolizer = self._named(event.stack or [])
        event = msgspec.structs.replace(event, stack=frames or None, symbolizer=symbolizer)
        event = self._demangled(event)
        if (
            frames
            and frames[0].symbol is None
            and (frames[0].build_id, frames[0].offset) == (event.build_id, event.offset)
        ):
            # It was found by this name; no table has to say so again.
            frames[0] = msgspec.structs.replace(
                frames[0], symbol=event.symbol, symbol_offset=0, symbol_source="watched_function", symbol_reason=None
            )
            event = msgspec.structs.replace(event, stack=frames)
        return event

    def _demangled(self, event: FunctionCall) -> FunctionCall:
        symbolizer = event.symbolizer
        if event.symbol_mangled is None:
            return event
        name = None if event.symbol_truncated else self._demangler.demangled(event.symbol_mangled)
        if name is not None:
            return msgspec.structs.replace(event, symbol=name, symbol_reason=None)
        if event.build_id is None or self._resolver is None:
            return event
        # What was cut has its whole name in the file's table, where the function begins at this place.
        answer = self._answer(Question(event.build_id, event.offset))
        if answer.symbol is None or answer.symbol_offset:
            return msgspec.structs.replace(event, symbol_reason=answer.reason or "no_symbol")
        return msgspec.structs.replace(
            event, symbol=answer.symbol, symbol_reason=None, symbolizer=symbolizer or answer.symbolizer
        )

    def _named(self, stack: list[StackFrame]) -> tuple[list[StackFrame], str | None]:
        symbolizer = None
        frames = []
        for index, frame in enumerate(stack):
            if frame.build_id is None or frame.offset is None:
                frames.append(msgspec.structs.replace(frame, symbol_reason="no_build_id"))
            elif self._resolver is None:
                frames.append(msgspec.structs.replace(frame, symbol_reason="disabled"))
            else:
                # Every frame but the innermost is where a call returns to.
                answer = self._answer(Question(frame.build_id, frame.offset, after_call=index > 0))
                if answer.symbol is not None:
                    symbolizer = answer.symbolizer
                frames.append(_with(frame, answer))
        return frames, symbolizer

    def _answer(self, question: Question) -> Frame:
        assert self._resolver is not None
        answer = self._resolver.resolve(question)
        if answer.reason == "pending":
            self._missing.add(question.build_id)
        return answer

    def hint(self, programs: Mapping[int, Program], records: bytes = b"") -> None:
        """Note where the programs of a batch have their files, and who runs them: where to look for their tables.

        A hint is believed only when the file there has the build-id.
        """
        known = {key: program for key, program in programs.items() if program.build_id}
        for program in known.values():
            if program.path.startswith("/") and len(self._hints) < WAITING_MAX:
                self._hints.setdefault(program.build_id, Path(program.path))
        new = {key for key, program in known.items() if self._ahead and program.build_id not in self._read_ahead}
        if not new:
            return
        if len(self._read_ahead) > AHEAD_MAX:
            self._read_ahead.clear()
        runners = names(records).programs
        for key in new:
            build_id = known[key].build_id
            self._read_ahead.add(build_id)
            self._missing.add(build_id)
            if key in runners:
                self._runners[build_id] = [runners[key][0]]

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
            self._hints.clear()
            return False
        missing, self._missing = self._missing, set()
        new = [build_id for build_id in sorted(missing - self._asked) if len(self._asked) < WAITING_MAX]
        pids = _pids(records, new) if new else {}
        for build_id in new:
            self._asked.add(build_id)
            found = self._runners.get(build_id, []) + pids.get(build_id, [])
            self._work.put((build_id, found, self._hints.pop(build_id, None)))
        self._hints.clear()
        self._runners.clear()
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
            build_id, pids, hint = work
            reason = self._resolver.load(build_id, pids, hint)
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
        if kind in _HAVE_STACKS and CALL_TYPES[call : call + 1] == (kind,):
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
