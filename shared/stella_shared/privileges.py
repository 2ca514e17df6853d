"""What a service may still do: it gives up capabilities and system calls, and says in its heartbeat what is left.

privileges.keep({"BPF", "PERFMON"})                         # no other capability, in no thread, ever again
privileges.allow_only(calls, switched_on=…)                 # or `privileges.refuse(calls, …)`
beat.detail["privileges"] = privileges.left()
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from stella_shared import native_confine, system_call_filter

log = logging.getLogger(__name__)

#: linux/capability.h: those that a part of a node may keep.
CAPABILITIES: Final = {
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "SETPCAP": 8,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "PERFMON": 38,
    "BPF": 39,
}
_filter: dict[str, str] = {"system_calls": "unfiltered: it was not asked for"}


def keep(names: Collection[str]) -> None:
    """Give up every capability that is not named, in all threads, for good.  What was not there stays away."""
    mask = sum(1 << CAPABILITIES[name] for name in names)
    try:
        native_confine.keep_capabilities(mask)
    except OSError as e:
        log.warning("capabilities cannot be given up in all threads: %s", e)
        _keep_in_this_thread(mask)


def _keep_in_this_thread(mask: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    have = ctypes.create_string_buffer(24)
    if libc.capget(header, have) == 0:
        words = list(struct.unpack("=6I", have.raw[:24]))
        for at in range(6):
            words[at] = 0 if at % 3 == 2 else words[at] & (mask >> (32 * (at // 3)) & 0xFFFF_FFFF)
        libc.capset(header, ctypes.create_string_buffer(struct.pack("=6I", *words)))


def allow_only(calls: Iterable[str], *, switched_on: bool) -> None:
    """Refuse every system call that is not named; with `switched_on` false, do nothing and say so."""
    _put(calls, "only those of its list", switched_on, system_call_filter.allowing)


def refuse(calls: Iterable[str], *, switched_on: bool) -> None:
    """Refuse the system calls that are named; with `switched_on` false, do nothing and say so."""
    _put(calls, "all but those of a list", switched_on, system_call_filter.refusing)


def _put(calls: Iterable[str], what: str, switched_on: bool, build: Any) -> None:
    if not switched_on:
        _filter["system_calls"] = "unfiltered: signals.syscall_filter is false"
        log.warning("system calls are not filtered: signals.syscall_filter is false")
        return
    if not system_call_filter.known_machine():
        _filter["system_calls"] = "unfiltered: the calls of this kind of machine are not known"
        return
    try:
        system_call_filter.install(build(calls, can_answer=native_confine.answers()))
    except OSError as e:
        _filter["system_calls"] = f"unfiltered: {e.strerror}"
        log.warning("system calls cannot be filtered: %s", e)
    else:
        _filter["system_calls"] = what


def left() -> dict[str, Any]:
    """Tell what this process may do: capabilities, whether it can gain any, system calls; and those refused so far."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines()
        if ":" in line
    )
    mask = int(fields.get("CapPrm", "0"), 16)
    names = {number: name for name, number in CAPABILITIES.items()}
    return {
        "capabilities": [names.get(n, str(n)) for n in range(64) if mask >> n & 1],
        "no_new_privileges": fields.get("NoNewPrivs", "").strip() == "1",
        "refused_calls": native_confine.refused(),
        **_filter,
    }
