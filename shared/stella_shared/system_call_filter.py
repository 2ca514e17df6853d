"""A seccomp filter for a service: built here, instruction by instruction, and put on all threads at once.

    install(allowing(names))        # everything else is refused
    install(refusing(names))        # everything else is allowed

A refused call returns EPERM.  `confine.c` tells the first of each by name and counts them; without it, the kernel's
audit log does.  A call that is newer than our table, and `clone3`, return ENOSYS, as on an older kernel: the C library
then takes another way.  `clone` into a new namespace is refused.  A call by another machine's numbers (32-bit) ends
the process.

Sources: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

from stella_shared import native_confine
from stella_shared.system_call_numbers import ARCHITECTURES, LAST, NUMBERS

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
# struct seccomp_data
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENT_AT = 0, 4, 16
_KILL, _TRAP, _ERROR, _ALLOW = 0x8000_0000, 0x0003_0000, 0x0005_0000, 0x7FFF_0000
#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NAMESPACES: Final = 0x7E02_0000
_SET_MODE_FILTER: Final = 1
_ALL_THREADS, _LOG = 1, 2
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

Instruction = tuple[int, int, int, int]


def allowing(names: Iterable[str], *, machine: str = "", can_answer: bool = True) -> list[Instruction]:
    """Return a filter that refuses everything but `names` and `clone`."""
    return _program(names, listed=_ALLOW, other=_refusal(can_answer), machine=machine, refusal=_refusal(can_answer))


def refusing(names: Iterable[str], *, machine: str = "", can_answer: bool = True) -> list[Instruction]:
    """Return a filter that refuses `names` and allows everything else."""
    return _program(names, listed=_refusal(can_answer), other=_ALLOW, machine=machine, refusal=_refusal(can_answer))


def _refusal(can_answer: bool) -> int:
    return _TRAP if can_answer else _ERROR | errno.EPERM


def _program(names: Iterable[str], *, listed: int, other: int, machine: str, refusal: int) -> list[Instruction]:
    machine = machine or platform.machine()
    numbers = NUMBERS[machine]
    unknown = _ERROR | errno.ENOSYS
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_GREATER, 0, 1, LAST),  # the numbers of x32 among them
        (_RETURN, 0, 0, unknown),
        (_EQUAL, 0, 1, numbers["clone3"]),
        (_RETURN, 0, 0, unknown),
        (_EQUAL, 0, 4, numbers["clone"]),
        (_LOAD, 0, 0, _ARGUMENT_AT),
        (_ANY_BIT, 0, 1, NAMESPACES),
        (_RETURN, 0, 0, refusal),
        (_RETURN, 0, 0, _ALLOW),
    ]
    # A name that is nowhere is a mistake of ours; one that is on another machine only is none.
    known = {name for table in NUMBERS.values() for name in table}
    if strange := set(names) - known:
        raise KeyError(f"no such system call: {', '.join(sorted(strange))}")
    for first, last in _ranges(sorted(numbers[name] for name in names if name in numbers)):
        program += [(_AT_LEAST, 0, 2, first), (_GREATER, 1, 0, last), (_RETURN, 0, 0, listed)]
    return [*program, (_RETURN, 0, 0, other)]


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[begin], numbers[at - 1]
            begin = at


def container_profile(names: Iterable[str], starting: Iterable[str]) -> dict[str, Any]:
    """Return the filter of `allowing(names)` in the form of container engines (OCI, Docker).

    `starting`: what the engine itself calls, once the filter is on and before the service runs.
    """
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [
            {"names": sorted({*names, *starting}), "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
            },
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }


def known_machine() -> bool:
    """Whether there is a table of calls for this kind of machine."""
    return platform.machine() in NUMBERS


def install(program: list[Instruction]) -> None:
    """Put the filter on every thread of this process, for good.  Raises `OSError` where the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in program), len(program) * 8)
    rows = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    flags = _ALL_THREADS | (0 if native_confine.answers() else _LOG)
    outcome = libc.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, flags, rows)
    if outcome:
        # A positive one is a thread that has a filter of its own.
        number = ctypes.get_errno() if outcome < 0 else errno.ESRCH
        raise OSError(number, os.strerror(number))
