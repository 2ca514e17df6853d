"""Names for what a batch holds only as numbers: cgroups and programs.

    batch ──▶ names(): distinct ids ──▶ memory ──miss──▶ the kernel's maps (bpf/include/stella_identity.h)
                                                 └────▶ a thread reads the program's build-id from its file

The kernel side left the names there with the event, so a container or process that is gone meanwhile still has
them.  Only the build-id needs the file itself: it is opened through the process while it lives, else under the
program's path, and is taken only from a file that is proved to be the same one.

A file may lie on a file system that hangs.  So a thread opens it, a batch waits for it 10 ms at the most, and says
`build_id_pending` otherwise.
"""

from __future__ import annotations

import contextlib
import os
import queue
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec

from stella_shared import elf_notes
from stella_shared.kernel_records import device_text, text
from stella_shared.raw_batches import Names
from stella_shared.wire import FORGOTTEN_PROGRAM, PROGRAM_KERNEL, PROGRAM_NONE, PROGRAM_UNKNOWN, Program

#: What is remembered here of each kind; the kernel's maps forget sooner.
REMEMBERED_MAX: Final = 16_384
#: Half for cgroups, half for programs.
MAX_BYTES: Final = 32 << 20
#: A remembered name without the content of its strings: key, slot, node of the order, and a `Program` besides.
_ENTRY_BYTES, _PROGRAM_BYTES = 250, 150
SETTLE_SECONDS: Final = 0.01
WAITING_MAX: Final = 1024
#: A program whose file could not be reached is asked about again after this, and no batch waits for it then.
AGAIN_SECONDS: Final = 1.0
#: Threads that read build-ids: one more than may hang at a time on a dead file system.
READERS: Final = 2
_CUT, _UNLINKED, _DETACHED = 1, 2, 4
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_Name = TypeVar("_Name")
_FIXED: Final = {
    PROGRAM_KERNEL: Program("", reason="kernel_thread"),
    PROGRAM_UNKNOWN: Program("", reason="no_memory_in_kernel"),
}
#: Reasons that may be over when the program is seen again.
_PASSING: Final = frozenset({"build_id_pending", "program_gone"})


class KernelProgram(msgspec.Struct, frozen=True):
    """struct stella_program, decoded."""

    path: str
    device: int
    inode: int
    flags: int


class Question(msgspec.Struct, frozen=True):
    """A program whose file is wanted, and a process that runs it: both numbers are its identity."""

    key: int
    program: KernelProgram
    pid: int
    start_ns: int


class Remembered(Generic[_Name]):
    """A memory with a bound in entries and one in bytes, which forgets what was not used for longest."""

    def __init__(self, size_of: Callable[[_Name], int], max_bytes: int) -> None:
        self._size_of = size_of
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, _Name] = OrderedDict()
        self._bytes = 0

    def get(self, key: int) -> _Name | None:
        """Return what is remembered, and keep it longer than the rest."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: int, value: _Name) -> None:
        """Remember `value`, in place of what was."""
        if key in self._entries:
            self._bytes -= self._size(self._entries.pop(key))
        self._entries[key] = value
        self._bytes += self._size(value)
        while len(self._entries) > REMEMBERED_MAX or self._bytes > self._max_bytes:
            self._bytes -= self._size(self._entries.popitem(last=False)[1])

    def stats(self) -> dict[str, int]:
        """Return sizes and bounds, for the heartbeat."""
        return {
            "entries": len(self._entries),
            "max_entries": REMEMBERED_MAX,
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
        }

    def _size(self, value: _Name) -> int:
        return _ENTRY_BYTES + self._size_of(value)


def _size_of_program(program: Program) -> int:
    return _PROGRAM_BYTES + sum(map(sys.getsizeof, (program.path, program.build_id, program.device)))


class Namer:
    """Names of this node.  `cgroup_of` and `program_of` ask the kernel's maps, None for what is not there."""

    def __init__(
        self,
        cgroup_of: Callable[[int], str | None],
        program_of: Callable[[int], KernelProgram | None],
        *,
        settle_seconds: float = SETTLE_SECONDS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._cgroup_of = cgroup_of
        self._program_of = program_of
        self._settle_seconds = settle_seconds
        self._cgroups: Remembered[str] = Remembered(sys.getsizeof, max_bytes // 2)
        self._programs: Remembered[Program] = Remembered(_size_of_program, max_bytes // 2)
        self._answers: queue.SimpleQueue[tuple[int, Program]] = queue.SimpleQueue()
        self._questions: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._asked: set[int] = set()
        self._again_at: dict[int, float] = {}
        self._is_slow = False
        self.missing: dict[str, int] = {}
        for number in range(READERS):
            # Daemons: a file that hangs must not hold up the end of the process.
            threading.Thread(target=self._read, name=f"build-ids-{number}", daemon=True).start()

    async def settle(self, names: Names) -> None:
        """Ask for the programs that are new in a batch, and wait for their build-ids for a moment.

        Once it has waited in vain it waits no more until an answer has come.
        """
        self._take_answers()
        new = {key for key, who in names.programs.items() if self._ask(key, *who)}
        if not new or self._is_slow:
            return
        with anyio.move_on_after(self._settle_seconds) as scope:
            while new & self._asked:
                await anyio.sleep(0.0005)
                self._take_answers()
        self._is_slow = scope.cancelled_caught

    def names(self, names: Names) -> tuple[dict[int, str], dict[int, Program]]:
        """Return path by cgroup id, and program by key, for the numbers of a batch; what is not known is absent."""
        cgroups = {}
        for cgroup in names.cgroups:
            path = self._cgroup(cgroup)
            if path is not None:
                cgroups[cgroup] = path
            elif cgroup:
                self._count("cgroup")
        programs = {}
        for key in names.programs:
            if key == PROGRAM_NONE:
                continue
            programs[key] = self._programs.get(key) or _FIXED.get(key, FORGOTTEN_PROGRAM)
            if programs[key].reason:
                self._count(programs[key].reason)
        return cgroups, programs

    def stats(self) -> dict[str, Any]:
        """Return figures for the heartbeat: what is remembered of each kind, how many programs wait."""
        return {"cgroups": self._cgroups.stats(), "programs": self._programs.stats(), "waiting": len(self._asked)}

    def _count(self, reason: str) -> None:
        self.missing[reason] = self.missing.get(reason, 0) + 1

    def _cgroup(self, cgroup: int) -> str | None:
        path = self._cgroups.get(cgroup)
        if path is None and cgroup:
            path = self._cgroup_of(cgroup)
            if path is not None:
                self._cgroups.put(cgroup, path)
        return path

    def _ask(self, key: int, pid: int, start_ns: int) -> bool:
        """Have a program's build-id read when it is not known; return whether that is the first time."""
        known = self._programs.get(key)
        if known and (known.reason not in _PASSING or time.monotonic() < self._again_at.get(key, 0.0)):
            return False
        if key in _FIXED or key == PROGRAM_NONE or key in self._asked or len(self._asked) >= WAITING_MAX:
            return False
        found = self._program_of(key)
        if found is None:
            return False
        if known is None:
            self._programs.put(key, described(found, reason="build_id_pending"))
        if len(self._again_at) >= REMEMBERED_MAX:
            self._again_at.clear()
        self._again_at[key] = time.monotonic() + AGAIN_SECONDS
        self._asked.add(key)
        self._questions.put(Question(key, found, pid, start_ns))
        return known is None

    def _take_answers(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                key, program = self._answers.get_nowait()
                self._asked.discard(key)
                self._programs.put(key, program)
                self._is_slow = False

    def _read(self) -> None:
        """Answer questions.  Runs in the threads."""
        while True:
            question = self._questions.get()
            build_id, reason = read_build_id(question)
            self._answers.put((question.key, described(question.program, build_id, reason)))


def described(found: KernelProgram, build_id: str = "", reason: str = "") -> Program:
    """Return what the evidence says of a program; where its name is worse than its build-id, why that is."""
    path = found.path
    if found.flags & _DETACHED:
        path, reason = path.removeprefix("/"), "in_no_directory"  # memfd_create(2) and the like
    elif found.flags & _UNLINKED:
        reason = "file_removed"
    elif found.flags & _CUT:
        path, reason = f"…{path}", "path_too_long"
    return Program(path, device_text(found.device), found.inode, build_id, reason)


def read_build_id(question: Question) -> tuple[str, str]:
    """Return the build-id of a program, or "" and why.  Never raises; may take as long as its file system does."""
    descriptor = _of_process(question)
    if descriptor < 0:
        descriptor = _of_path(question.program)
    if descriptor < 0:
        return "", "program_gone"
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "", "not_a_file"
        found = elf_notes.build_id(lambda offset, size: os.pread(descriptor, size, offset))
    except OSError:
        return "", "file_unreadable"
    finally:
        os.close(descriptor)
    return found, "" if found else "no_build_id"


def _of_process(question: Question) -> int:
    """Return a descriptor of what the process runs, -1 when it is not the same process and program any more."""
    link = f"/proc/{question.pid}/exe"
    try:
        descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    try:
        # Opened first: what is looked at now holds for what was opened, unless it ran the same name anew.
        same = os.readlink(os.fsencode(link)).removesuffix(b" (deleted)")
        if text(same).endswith(question.program.path) and _start_ticks(question.pid) == _ticks(question.start_ns):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return -1


def _of_path(program: KernelProgram) -> int:
    """Return a descriptor of the file under the program's path when device and inode say that it is the same."""
    if program.flags:
        return -1
    try:
        descriptor = os.open(program.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return -1
    found = os.fstat(descriptor)
    if (os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino) == (program.device, program.inode):
        return descriptor
    os.close(descriptor)
    return -1


def _ticks(start_ns: int) -> int:
    return start_ns * _TICKS_PER_SECOND // 1_000_000_000


def _start_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read(4096).rpartition(b")")[2].split()[19])
