"""Clocks: the kernel's boot-time clock, the boot's name, and UTC as text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NS_PER_SECOND: Final = 1_000_000_000


def boottime_ns() -> int:
    """Return CLOCK_BOOTTIME in ns: the clock of `bpf_ktime_get_boot_ns`, which counts through suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Return the kernel's name of this boot as 32 hex digits (random(4))."""
    return _BOOT_ID.read_text("ascii").strip().replace("-", "")


def utc_text(unix_ns: int) -> str:
    """Return a Unix time in ns as RFC 3339 with nine fractional digits and `Z`."""
    seconds, ns = divmod(unix_ns, _NS_PER_SECOND)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{ns:09d}Z"
