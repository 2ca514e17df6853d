"""Streams chunk files: digest, Merkle root and every line's check, on all cores, in bounded memory.

    this thread:   read a file, SHA-256 of it, unpack ………………………… → tree, numbers, doubtful lines
    pool:                         └ lines of the block: places (lines.c), leaf hashes (merkle.c) ┘

Blocks are worked on in any order and taken in in theirs.  There is a fixed number of them, used again and again.
Without the parts in C the same is done in Python, in this thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ctypes import byref, c_uint8, c_uint64
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Final

from stella_shared.evidence import merkle, native_lines
from stella_shared.evidence.compressed import FrameReader, LineStream
from stella_shared.evidence.lines import MAX_LINE_BYTES, Digest, LineChecker
from stella_shared.evidence.merkle import Frontier
from stella_shared.evidence.native_lines import Place, Table

BLOCK_BYTES: Final = 512 << 10
_THREADS_MAX: Final = 5
#: Lines of a block that are worked on at once.  More, which only bad lines are short enough for, take longer.
_LINES_MAX: Final = 8192
#: By which lines shrink, more or less: a file with less than a block's worth of them is not worth the threads.
_USUAL_RATIO: Final = 16
#: Room for the beginning of a line, from the block before.
_REST_USUALLY: Final = 16 << 10


class _Block:
    """A stretch of whole lines, `data[at:end]`, and what follows of the next one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._make_room(size + _REST_USUALLY)
        self.at = self.end = self.filled = 0

    def fill(self, stream: LineStream, rest: bytes) -> int:
        """Put `rest` and the next bytes of the stream here; return how many the latter are, 0 at its end."""
        begin, room = len(rest), len(rest) + self._size
        if len(self.data) < room:
            self._make_room(room)
        self.data[:begin] = rest
        fresh = stream.readinto(memoryview(self.data)[begin:room])
        self.filled = begin + fresh
        self.at, self.end = 0, self.data.rfind(b"\n", begin, self.filled) + 1
        return fresh

    def _make_room(self, size: int) -> None:
        self.data = bytearray(size)

    def rest(self) -> bytes:
        """Return the bytes after the last whole line."""
        return bytes(memoryview(self.data)[self.end : self.filled])

    def first_line_bytes(self) -> int:
        """Return the length of the first line, as far as it is here.  No later one can be longer than a block."""
        newline = self.data.find(b"\n", 0, self.filled)
        return self.filled if newline < 0 else newline

    def work(self, table: Table | None) -> None:
        """Do what can be done without knowing what stood before.  Runs in any thread."""

    def take_in(self, tree: Frontier, checker: LineChecker | None, table: Table | None) -> None:
        """Do the rest: every line is in the tree, and checked."""
        lines = bytes(memoryview(self.data)[: self.end]).split(b"\n")
        lines.pop()
        if checker is not None:
            for number, line in enumerate(lines, tree.size + 1):
                checker.judge(number, line)
        tree.add(merkle.leaves(lines))


class _NativeBlock(_Block):
    """The same with the parts in C."""

    def __init__(self, size: int, lib: ctypes.CDLL) -> None:
        super().__init__(size)
        self._leaves_of = lib.stella_merkle_leaves
        self._leaves = bytearray(32 * _LINES_MAX)
        self._leaves_pointer = (c_uint8 * len(self._leaves)).from_buffer(self._leaves)
        self._places = (Place * _LINES_MAX)()
        self._lines = self._done = 0

    def _make_room(self, size: int) -> None:
        self.data = bytearray(size)
        self._pointer = (c_uint8 * size).from_buffer(self.data)

    def work(self, table: Table | None) -> None:
        address, length = ctypes.addressof(self._pointer) + self.at, self.end - self.at
        room, consumed = _LINES_MAX, c_uint64()
        if table is not None:
            room, _ = table.place(address, length, self._places)
        self._lines = self._leaves_of(address, length, room, self._leaves_pointer, byref(consumed))
        self._done = self.at + consumed.value

    def take_in(self, tree: Frontier, checker: LineChecker | None, table: Table | None) -> None:
        while True:
            before = tree.size
            tree.add_packed(self._leaves, self._lines)
            if checker is not None and table is not None:
                for line, offset in checker.numbers.mark(self._places, self._lines):
                    begin = self.at + offset
                    text = bytes(memoryview(self.data)[begin : self.data.index(b"\n", begin)])
                    checker.judge(before + line + 1, text)
            self.at = self._done
            if self.at == self.end:
                return
            self.work(table)


_Waiting = deque[tuple[_Block, Future[None] | None]]


class ChunkReader:
    """Reads chunk files one after the other, with the same threads and buffers.  Close it after use."""

    def __init__(self, *, native: bool = True, block_bytes: int = BLOCK_BYTES) -> None:
        lib = merkle.library() if native and native_lines.library() is not None else None
        cores = len(os.sched_getaffinity(0))
        # One more than there are cores: whoever waits for Python's lock leaves no core idle.
        threads = min(cores + 1, _THREADS_MAX)
        self._block_bytes = block_bytes
        self._native = lib is not None
        self._pool = ThreadPoolExecutor(threads, "chunk") if lib is not None and cores > 1 else None
        count = threads + 2 if self._pool else 1
        self._blocks = [_Block(block_bytes) if lib is None else _NativeBlock(block_bytes, lib) for _ in range(count)]

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def read(
        self,
        path: Path,
        checker: LineChecker | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        limit: int = sys.maxsize,
    ) -> Digest:
        """Return what the file is; `checker` has then seen each of its lines.

        No more than `limit` bytes of lines are unpacked: what goes on behind them is damage, like what is no
        lines at all.  `progress` is called with the number of bytes of the file that were read.  Raises
        `ValueError` for a line over `MAX_LINE_BYTES`, and `OSError`.
        """
        table = checker.table() if checker is not None and self._native else None
        waiting: _Waiting = deque()
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if checker is not None:
                    checker.expect(size)
                return self._read(
                    FrameReader(file),
                    # One block alone is done sooner than handed over.
                    pool=self._pool if size > self._block_bytes // _USUAL_RATIO else None,
                    waiting=waiting,
                    checker=checker,
                    table=table,
                    progress=progress or (lambda done: None),
                    limit=limit,
                )
        finally:
            # Blocks are used again: after a failure too nobody may be working on one.
            wait([future for _, future in waiting if future is not None])

    def _read(
        self,
        file: FrameReader,
        *,
        pool: ThreadPoolExecutor | None,
        waiting: _Waiting,
        checker: LineChecker | None,
        table: Table | None,
        progress: Callable[[int], None],
        limit: int,
    ) -> Digest:
        tree, stream = merkle.frontier(), LineStream(file)
        size, rest, told, damage = 0, b"", 0, ""

        def take_in(until: int) -> None:
            while len(waiting) > until:
                block, future = waiting[0]
                if future is None:
                    block.work(table)
                else:
                    future.result()
                waiting.popleft()
                block.take_in(tree, checker, table)

        def too_long() -> ValueError:
            take_in(0)
            return ValueError(f"line {tree.size + 1} is over {MAX_LINE_BYTES} bytes")

        for block in cycle(self._blocks):
            take_in(len(self._blocks) - 1)
            try:
                fresh = block.fill(stream, rest)
            except ValueError as e:
                damage = str(e)
                break
            if not fresh:
                break
            if block.first_line_bytes() > MAX_LINE_BYTES:
                raise too_long()
            size += fresh
            if size > limit:
                damage = f"it holds more than the {limit} bytes of lines that its ledger tells of"
                break
            waiting.append((block, pool.submit(block.work, table) if pool else None))
            rest = block.rest()
            if len(rest) > MAX_LINE_BYTES:
                raise too_long()
            progress(file.bytes - told)
            told = file.bytes
        take_in(0)
        file.rest()
        progress(file.bytes - told)
        return Digest(size, tree.size, file.sha256.hexdigest(), tree.root().hex(), not rest, damage)
