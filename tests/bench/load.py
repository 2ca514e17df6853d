"""The program that opens: `tests/system/generate.c`, COUNT opens of a few files in memory, at a rate or without one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

FILES = 64
#: Stands in the path of every file that the program opens, once, and in nothing else that is recorded.
MARKER = b"/libmodule-"

Start = Callable[..., subprocess.Popen[bytes]]


class Load(msgspec.Struct):
    """What one run of the program, or of several at once, was: opens that were asked for, and its own clock."""

    count: int
    wall_seconds: float
    cpu_seconds: float
    programs: int = 1

    @property
    def opens(self) -> int:
        """Every open with the marker in its path: those that make the files come first."""
        return self.count + FILES * self.programs

    @property
    def wall_ns(self) -> float:
        """Nanoseconds of the clock for one open and close."""
        return self.wall_seconds / self.count * 1e9

    @property
    def cpu_ns(self) -> float:
        """Nanoseconds of the program's own CPU time for one open and close."""
        return self.cpu_seconds / self.count * 1e9


class Generator:
    """The program, ready and waiting; `run` lets it go and returns at its end."""

    def __init__(self, process: subprocess.Popen[bytes], count: int) -> None:
        self._process = process
        self._count = count
        self.pid = process.pid

    def run(self) -> Load:
        """Let the program open its files."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(b"x")
        self._process.stdin.flush()
        elapsed, user, system = map(int, self._process.stdout.read().split())
        return Load(self._count, elapsed / 1e9, (user + system) / 1e6)


@contextmanager
def ready(start: Start, program: Path, count: int, rate: int) -> Iterator[Generator]:
    """Give the program in the state before its first open; `start` begins a process (`Cgroup.run`)."""
    with tempfile.TemporaryDirectory(prefix="stella-bench-", dir="/dev/shm") as folder:
        process = start(
            program, folder, str(count), str(rate), str(FILES), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout
            process.stdout.readline()
            try:
                yield Generator(process, count)
            finally:
                process.kill()


def opens(start: Start, program: Path, count: int, rate: int) -> Load:
    """Run the program; return what it was."""
    with ready(start, program, count, rate) as generator:
        return generator.run()


def opens_of_many(start: Start, program: Path, count: int, rate: int, programs: int) -> Load:
    """Run the program several times at once, with its share of count and rate each."""
    with ExitStack() as stack, ThreadPoolExecutor(programs) as threads:
        ready_ones = [
            stack.enter_context(ready(start, program, count // programs, rate // programs)) for _ in range(programs)
        ]
        loads = list(threads.map(Generator.run, ready_ones))
    return Load(
        sum(one.count for one in loads),
        max(one.wall_seconds for one in loads),
        sum(one.cpu_seconds for one in loads),
        programs,
    )


def _plain(*command: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([os.fspath(word) for word in command], **kwargs)


def bare(program: Path, count: int) -> Load:
    """Run the program as fast as it goes, recorded by nobody."""
    return opens(_plain, program, count, 0)
