"""Facts of the machine that decide whether probes work: kernel, BTF, privileges, mounts, security modules."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, Final

_FILES: Final = {
    "unprivileged_bpf_disabled": "/proc/sys/kernel/unprivileged_bpf_disabled",
    "perf_event_paranoid": "/proc/sys/kernel/perf_event_paranoid",
    "kptr_restrict": "/proc/sys/kernel/kptr_restrict",
    "bpf_stats_enabled": "/proc/sys/kernel/bpf_stats_enabled",
    "lsm": "/sys/kernel/security/lsm",
    "lockdown": "/sys/kernel/security/lockdown",
    "os_release": "/etc/os-release",
}
_MOUNTED: Final = frozenset({"tracefs", "debugfs", "bpf", "cgroup", "cgroup2", "securityfs"})
_WORDS: Final = ("BPF", "BTF", "TRACEPOINTS", "UPROBE", "KPROBE", "CGROUPS", "SECCOMP", "LOCKDOWN")
_STATUS: Final = ("Cap", "NoNewPrivs", "Seccomp", "Uid", "Gid")
_CONFIG_BYTES: Final = 4 << 20


def collect() -> dict[str, Any]:
    """Return what is known; what cannot be read says why."""
    system = os.uname()
    return {
        "uname": " ".join((system.sysname, system.nodename, system.release, system.version, system.machine)),
        "btf": _size(Path("/sys/kernel/btf/vmlinux")),
        "tracefs_events": Path("/sys/kernel/tracing/events").is_dir(),
        "cpus": {"online": os.cpu_count(), "possible": _read("/sys/devices/system/cpu/possible")},
        "memory": [line for line in _read("/proc/meminfo").splitlines() if line.startswith(("MemT", "MemA"))],
        "process": [line for line in _read("/proc/self/status").splitlines() if line.startswith(_STATUS)],
        "cgroup": _read("/proc/self/cgroup").splitlines(),
        "mounts": _mounts(),
        "configuration": _configuration(system.release),
        **{name: _read(path) for name, path in _FILES.items()},
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError as e:
        return f"not readable: {e.strerror}"


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError as e:
        return f"not there: {e.strerror}"


def _mounts() -> list[str]:
    rows = _read("/proc/self/mounts").splitlines()
    return [row for row in rows if len(row.split()) > 2 and row.split()[2] in _MOUNTED]


def _configuration(release: str) -> list[str] | str:
    """Return the lines of the kernel's configuration that concern us, from wherever it can be read."""
    for path, opener in ((Path("/proc/config.gz"), gzip.open), (Path(f"/boot/config-{release}"), open)):
        try:
            with opener(path, "rb") as file:
                text = file.read(_CONFIG_BYTES).decode(errors="replace")
        except (OSError, EOFError):
            continue
        return [line for line in text.splitlines() if line.startswith("CONFIG_") and any(w in line for w in _WORDS)]
    return "not readable: neither /proc/config.gz nor /boot/config"
