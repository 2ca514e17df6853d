"""Processes: who is who beyond a bare pid, and children that never outlive their parent.

A pid alone says little: it is reused.  `Identity` adds the start time, `command_line` says what runs there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import anyio
import msgspec

# linux/prctl.h, linux/capability.h
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_SETPCAP = 8
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39
_CAP_MAX = 63

_libc = ctypes.CDLL(None, use_errno=True)


class Identity(msgspec.Struct, frozen=True):
    """One life of one process: its pid and when it started, in clock ticks since boot."""

    pid: int
    start_ticks: int


def identity(pid: int) -> Identity | None:
    """Return who runs under `pid` now; None when nobody does (a zombie is nobody)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything, brackets too: fields count from its end.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Identity(pid, int(fields[19]))


def command_line(pid: int) -> list[str]:
    """Return the arguments that `pid` was started with; [] when it is gone or not ours to see."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0")] if raw else []


def parent(pid: int) -> int:
    """Return the pid of the parent of `pid`; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def is_alive(who: Identity) -> bool:
    """Return whether this very process still runs."""
    return identity(who.pid) == who


def rss_bytes(pid: int) -> int:
    """Return the resident memory of `pid`; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def pss_bytes(pid: int) -> int | None:
    """Return the memory of `pid` with shared pages shared out; None when it is gone or not ours to look into."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration, ValueError):
        return None


def capabilities_for_children() -> set[int]:
    """Return the capabilities that a program started from here would hold.

    Root hands on what it has; for anybody else only ambient capabilities survive exec (capabilities(7)).
    """
    field = b"CapEff:" if os.geteuid() == 0 else b"CapAmb:"
    for line in Path("/proc/self/status").read_bytes().splitlines():
        if line.startswith(field):
            bits = int(line.split()[1], 16)
            return {n for n in range(_CAP_MAX + 1) if bits >> n & 1}
    return set()


class Child:
    """A started process in a session of its own; the kernel kills it when this process dies.

    Output is appended to `log`: the child never waits for a reader.  With `keep`, it loses every capability
    not named there, for good.  Must be made in the main thread, since the kernel ties a child to the thread
    that forked it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str],
        keep: Collection[int] | None = None,
    ) -> None:
        parent = os.getpid()
        dropped = [n for n in range(_CAP_MAX + 1) if n not in keep] if keep is not None else []

        def tie() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died between fork and prctl
                os._exit(1)
            # Who may not shrink the bounding set is not root, and has ambient capabilities at most.
            for capability in dropped:
                _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
            if dropped:
                _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
                _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
                preexec_fn=tie,  # noqa: PLW1509  # safe: it makes system calls only, and takes no lock
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._exited = anyio.Event()
        who = identity(self._process.pid)
        self.identity = who or Identity(self._process.pid, 0)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code once the child has ended (negative: the signal).  One task waits here."""
        await anyio.wait_readable(self._pidfd)
        code = self._process.wait()
        os.close(self._pidfd)
        self._pidfd = -1
        self._exited.set()
        return code

    async def exited(self) -> None:
        """Return once `wait` has seen the end.  Any number of tasks may wait here."""
        await self._exited.wait()

    @property
    def running(self) -> bool:
        """Whether the child has not been seen to end."""
        return not self._exited.is_set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child; nothing happens when it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
