"""How a process that reads strangers' files closes in first.

A parser of files out of containers runs in a process of its own: no capabilities, no new privileges, no path that it
could open, bounded memory, CPU time and output.  Whatever happens in there ends that process and nothing else.
What it is to read, it has open already.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_SYS_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_VERSION: Final = 1
_CAPABILITIES_V3: Final = 0x20080522
#: Address space is more than memory: the libraries' own mappings and that of the file.
_ADDRESSES_MAX: Final = 8 << 30


def shut_in(memory_bytes: int, answer_bytes: int, seconds: int) -> None:
    """Give up everything that reading open files does not need."""
    give_up_privileges()
    limit(memory_bytes, answer_bytes, seconds)


def give_up_privileges() -> None:
    """Keep no capability, gain none, open no path, and end with the process that has started this one."""
    end_with_parent()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _close_the_file_system(libc)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_V3, 0))
    libc.capset(header, ctypes.create_string_buffer(24))


def end_with_parent() -> None:
    """Have the kernel end this process when the thread that has started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def limit(memory_bytes: int, answer_bytes: int, seconds: int) -> None:
    """Bound memory, what is written to a file, and CPU time."""
    for which, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_AS, _ADDRESSES_MAX),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, answer_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (limit, limit))


def _close_the_file_system(libc: ctypes.CDLL) -> None:
    """Let this process open no path, reach no TCP port and signal no other one, as far as the kernel has Landlock.

    Without capabilities a process of root still owns what root owns, the signing key among it.
    """
    version = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return
    files = 0x1FFF | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0) | (0x8000 if version >= 5 else 0)
    # Nothing but files up to version 3, ports from 4, signals and abstract sockets from 6.
    rules = struct.pack("=QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rule_set = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, rules, len(rules), 0)
    if rule_set >= 0:
        libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, rule_set, 0)
        os.close(rule_set)
