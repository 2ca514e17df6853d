"""What the collector keeps of the powers it was started with, before it loads and once its probes are attached.

| Capability | For |
|---|---|
| `BPF`, `PERFMON` | loading the programs, and attaching them |
| `SYS_ADMIN` | uprobes, where the kernel demands it (decision 0002): each new program or library is a new attachment |
| `SYS_PTRACE`, `DAC_READ_SEARCH` | what other users' processes run: /proc/PID/exe, root, maps; programs and libraries |
| `DAC_OVERRIDE` | a state directory of another user |

Without probes in programs and libraries nothing is attached later: `PERFMON` goes too, and `BPF` alone attaches
nothing.
"""

from __future__ import annotations

import os

from stella_collector import system_calls
from stella_shared import privileges
from stella_shared.config import Signals, state_directory


def attaches_later(signals: Signals) -> bool:
    """Whether probes sit in files: then each new one that a target runs is attached to while the node runs."""
    probes = signals.probes
    return bool(
        probes.openssl_read or probes.openssl_write or probes.functions
        or (probes.libc_source == "uprobe" and (probes.libc_connect or probes.libc_accept))
    )  # fmt: skip


def to_load(signals: Signals) -> set[str]:
    """Return the capabilities that loading and attaching need."""
    names = {"BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH"}
    if attaches_later(signals):
        names.add("SYS_ADMIN")
    state = state_directory(signals)
    if state.exists() and state.stat().st_uid != os.geteuid():
        names.add("DAC_OVERRIDE")
    return names


def to_watch(signals: Signals) -> set[str]:
    """Return the capabilities that are needed from then on."""
    return to_load(signals) if attaches_later(signals) else to_load(signals) - {"PERFMON"}


def before_loading(signals: Signals) -> None:
    """Give up what loading does not need.  Before anything from outside is read, mounts having been made."""
    # SETPCAP takes the rest out of the bounding set once more, after attaching.
    privileges.keep(to_load(signals) | {"SETPCAP"})
    privileges.allow_only(system_calls.ALLOWED, switched_on=signals.syscall_filter)


def after_attaching(signals: Signals) -> None:
    """Give up what watching does not need."""
    privileges.keep(to_watch(signals))
    if not attaches_later(signals):
        privileges.allow_only(system_calls.ALLOWED - system_calls.ATTACHING, switched_on=signals.syscall_filter)


def to_replay(signals: Signals) -> None:
    """Give up everything but the reading of files: no kernel is spoken to."""
    privileges.keep(to_load(signals) & {"DAC_OVERRIDE", "DAC_READ_SEARCH"})
    privileges.allow_only(system_calls.ALLOWED - system_calls.ATTACHING - {"bpf"}, switched_on=signals.syscall_filter)
