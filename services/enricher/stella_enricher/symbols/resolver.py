"""Answers what is at an address: from memory at once, else by `load`, which blocks and belongs into a thread.

    resolve → cache of answers → tables in memory          never touches a file
    load    → tables on disk → the file, its debug file → a child reads them → table

Both caches are bounded, and so is what is remembered about build-ids that nothing is known of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from stella_enricher.symbols.capturing import Captured, Limits, capture
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.store import Store
from stella_enricher.symbols.table import Table
from stella_shared.symbols import Frame, Question

log = logging.getLogger(__name__)

#: When to look again for what was not found, and for what could not be read.
_RETRY_SECONDS: Final = {"no_file": 300.0, "build_id_mismatch": 300.0, "no_segment": 300.0}
_RETRY_OTHERS_SECONDS: Final = 3600.0
_ABSENT_MAX: Final = 65_536
#: What a table holds beyond its body.
_TABLE_OVERHEAD_BYTES: Final = 4096

Fetch = Callable[[str, Literal["executable", "debuginfo"]], IO[bytes] | None]


class Resolver:
    """Resolves addresses.  `resolve` and `load` may run in different threads."""

    def __init__(
        self,
        finder: Finder,
        store: Store | None,
        *,
        max_answers: int,
        max_table_bytes: int,
        fetch: Fetch | None = None,
        limits: Limits = Limits(),  # noqa: B008  # it cannot change
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._finder = finder
        self._store = store
        self._fetch = fetch
        self._limits = limits
        self._clock = clock
        self._max_answers = max_answers
        self._max_table_bytes = max_table_bytes
        self._answers: OrderedDict[Question, Frame] = OrderedDict()
        self._tables: OrderedDict[str, Table] = OrderedDict()
        self._table_bytes = 0
        self._absent: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self.hits = self.misses = self.captured = 0

    def resolve(self, question: Question) -> Frame:
        """Return the answer as far as memory goes; with reason `pending`, `load` of its build-id knows more."""
        with self._lock:
            answer = self._answers.get(question)
            if answer is not None:
                self.hits += 1
                self._answers.move_to_end(question)
                return answer
            self.misses += 1
            table = self._tables.get(question.build_id)
            if table is None:
                reason, retry_at = self._absent.get(question.build_id, ("", 0.0))
                if not reason or retry_at <= self._clock():
                    reason = "pending"
                return Frame(build_id=question.build_id, offset=question.offset, reason=reason)
            self._tables.move_to_end(question.build_id)
            answer = _answer(question, table)
            self._answers[question] = answer
            if len(self._answers) > self._max_answers:
                self._answers.popitem(last=False)
            return answer

    def load(self, build_id: str, pids: Iterable[int] = (), path: Path | None = None) -> str:
        """Bring the table of a build-id into memory; return "" or the reason why there is none.  Blocks, never raises.

        Looked at are, in this order: the table on disk, `path`, what these processes and our own have mapped, the
        debug directories, debuginfod.
        """
        try:
            found = self._load(build_id, list(pids), path)
        except (OSError, RuntimeError, ValueError, MemoryError) as e:
            # Out of descriptors or processes: about the file this says nothing.
            log.warning("symbols of %s: %s", build_id, e)
            found = Captured("no_file")
        with self._lock:
            if found.table is None:
                if len(self._absent) >= _ABSENT_MAX:
                    self._absent.clear()
                retry = _RETRY_SECONDS.get(found.reason, _RETRY_OTHERS_SECONDS)
                self._absent[build_id] = (found.reason, self._clock() + retry)
                return found.reason
            self._absent.pop(build_id, None)
            self._keep(build_id, found.table)
        return ""

    def resolve_now(self, question: Question, pids: Iterable[int] = (), path: Path | None = None) -> Frame:
        """Return the answer, after reading what must be read for it.  Blocks."""
        answer = self.resolve(question)
        if answer.reason != "pending":
            return answer
        reason = self.load(question.build_id, pids, path)
        return self.resolve(question) if not reason else msgspec.structs.replace(answer, reason=reason)

    def stats(self) -> dict[str, int]:
        """Return sizes and counts for the heartbeat."""
        with self._lock:
            return {
                "entries": len(self._answers),
                "max_entries": self._max_answers,
                "hits": self.hits,
                "misses": self.misses,
                "tables": len(self._tables),
                "table_bytes": self._table_bytes,
                "max_table_bytes": self._max_table_bytes,
                "files_read": self.captured,
                "without_table": len(self._absent),
                "damaged": self._store.damaged if self._store else 0,
            }

    def _keep(self, build_id: str, table: Table) -> None:
        old = self._tables.pop(build_id, None)
        if old is not None:
            self._table_bytes -= old.bytes + _TABLE_OVERHEAD_BYTES
            # It knows more than the one before, so what that one said is forgotten.
            for question in [q for q in self._answers if q.build_id == build_id]:
                del self._answers[question]
        self._tables[build_id] = table
        self._table_bytes += table.bytes + _TABLE_OVERHEAD_BYTES
        while self._table_bytes > self._max_table_bytes and len(self._tables) > 1:
            _, gone = self._tables.popitem(last=False)
            self._table_bytes -= gone.bytes + _TABLE_OVERHEAD_BYTES

    def _load(self, build_id: str, pids: Sequence[int], path: Path | None) -> Captured:
        kept = self._store.get(build_id) if self._store else None
        if kept is not None and (_is_whole(kept) or not self._has_debug_file(build_id)):
            return Captured("", b"", kept)
        with self._program(build_id, pids, path) as (file, reason):
            if file < 0:
                return Captured("", b"", kept) if kept is not None else Captured(reason)
            found = self._read(build_id, file)
        if found.table is None and kept is not None:
            return Captured("", b"", kept)
        if found.table is not None and self._store is not None:
            self._store.put(build_id, found.data)
        return found

    def _has_debug_file(self, build_id: str) -> bool:
        with self._finder.debug_file(build_id) as (descriptor, _):
            return descriptor >= 0

    def _read(self, build_id: str, file: int) -> Captured:
        """Return the table of an open program, with that of its debug file when there is one."""
        self.captured += 1
        first = capture(build_id, file, limits=self._limits)
        if first.table is None or _is_whole(first.table):
            return first
        link, crc = first.table.head.link or ("", -1)
        beside = os.path.dirname(os.readlink(f"/proc/self/fd/{file}"))
        with self._finder.debug_file(build_id, link, beside if beside.startswith("/") else "") as (debug, by_link):
            if debug >= 0:
                both = capture(build_id, file, debug, crc if by_link else -1, self._limits)
                if both.table is not None:
                    return both
        fetched = self._fetch(build_id, "debuginfo") if self._fetch else None
        if fetched is not None:
            with fetched:
                both = capture(build_id, file, fetched.fileno(), limits=self._limits)
                if both.table is not None:
                    return both
        return first

    @contextlib.contextmanager
    def _program(self, build_id: str, pids: Sequence[int], path: Path | None) -> Iterator[tuple[int, str]]:
        """Give a descriptor of the program, or -1 and the reason."""
        reason = "no_file"
        with contextlib.ExitStack() as stack:
            if path is not None:
                file, found = stack.enter_context(self._finder.of_path(path, build_id))
                if file >= 0:
                    yield file, ""
                    return
                reason = "build_id_mismatch" if found else reason
            # Short programs are gone by now; the libraries that everybody has, libc first, are ours too.
            for pid in [*pids, os.getpid()]:
                file = stack.enter_context(self._finder.of_process(pid, build_id))
                if file >= 0:
                    yield file, ""
                    return
            file = stack.enter_context(self._finder.program(build_id))
            if file < 0 and self._fetch is not None:
                fetched = self._fetch(build_id, "executable")
                if fetched is not None:
                    file = stack.enter_context(fetched).fileno()
            if file < 0 and self._has_debug_file(build_id):
                # Where an offset is loaded stands in the program alone.
                reason = "no_segment"
            yield file, reason


def _is_whole(table: Table) -> bool:
    """Return whether a separate debug file would add nothing worth looking for."""
    sources = table.head.sources
    return "symtab" in sources or any(source.startswith("debug_file:") for source in sources)


def _answer(question: Question, table: Table) -> Frame:
    head = table.head
    step = 1 if question.after_call and question.offset else 0
    at = table.address(question.offset - step)
    found = table.find(at) if at is not None else None
    reason = None
    if found is None:
        reason = head.reason or ("no_segment" if at is None else "no_symbol")
    return Frame(
        build_id=question.build_id,
        offset=question.offset,
        symbol=found.name if found else None,
        symbol_offset=at + step - found.symbol_begin if found and at is not None else None,
        symbol_source=head.sources[found.source] if found else None,
        inlined=(table.inlined(at) or None) if found and at is not None else None,
        reason=reason,
        libc=head.libc or None,
        symbolizer=head.symbolizer,
    )
