"""The probes of the configuration: which programs each has, where they go, and what became of it."""

from __future__ import annotations

import msgspec

from stella_shared.config import Signals


class Probe(msgspec.Struct, frozen=True):
    """One probe of the configuration: its programs and where they go.

    `tracepoints` are (program, category, event, needed); `functions` are (entry program, return program,
    function) for uprobes.
    """

    name: str
    tracepoints: tuple[tuple[str, str, str, bool], ...] = ()
    btf: tuple[str, str] | None = None
    functions: tuple[tuple[str, str, str], ...] = ()
    library: str = ""

    def programs(self) -> list[str]:
        """Names of the programs this probe needs."""
        names = [row[0] for row in self.tracepoints]
        names += [self.btf[0]] if self.btf else []
        names += [name for row in self.functions for name in row[:2]]
        return names

    def attach_point(self) -> str:
        """Where it attaches, for people."""
        if self.btf:
            return f"tp_btf/{self.btf[1]}"
        if self.tracepoints:
            return ", ".join(f"{category}/{event}" for _, category, event, _ in self.tracepoints)
        return ", ".join(f"{self.library}:{function}" for *_, function in self.functions)


def _syscall(program: str, call: str, needed: bool = True) -> tuple[tuple[str, str, str, bool], ...]:
    # The end of a call tells all: its outcome, and what it was given still stands in the registers.
    return ((f"{program}_ex", "syscalls", f"sys_exit_{call}", needed),)


def probes_of(signals: Signals) -> list[tuple[Probe, bool]]:
    """Return every probe, and whether the configuration wants it."""
    wants = signals.probes
    connect: Probe
    accept: Probe
    if wants.libc_source == "uprobe":
        connect = Probe("libc_connect", functions=(("stella_conn_ue", "stella_conn_ux", "connect"),), library="libc")
        accept = Probe(
            "libc_accept",
            functions=(
                ("stella_acc_ue", "stella_acc_ux", "accept"),
                ("stella_acc4_ue", "stella_acc4_ux", "accept4"),
            ),
            library="libc",
        )
    else:
        connect = Probe("libc_connect", tracepoints=_syscall("stella_conn", "connect"))
        accept = Probe(
            "libc_accept", tracepoints=_syscall("stella_acc", "accept", False) + _syscall("stella_acc4", "accept4")
        )
    return [
        (
            Probe(
                "sys_enter_openat",
                # open(2) exists on x86 only, openat2(2) since Linux 5.6.
                tracepoints=_syscall("stella_opena", "openat")
                + _syscall("stella_open", "open", False)
                + _syscall("stella_open2", "openat2", False),
            ),
            wants.sys_enter_openat,
        ),
        (
            Probe(
                "sched_process_exec",
                btf=("stella_exec", "sched_process_exec"),
                # The stack of who asks for it: afterwards it is another program's.
                tracepoints=(
                    ("stella_execve", "syscalls", "sys_enter_execve", False),
                    ("stella_execveat", "syscalls", "sys_enter_execveat", False),
                )
                if "process_exec" in wants.stacks
                else (),
            ),
            wants.sched_process_exec,
        ),
        (Probe("inet_sock_set_state", btf=("stella_tcp", "inet_sock_set_state")), wants.inet_sock_set_state),
        (connect, wants.libc_connect),
        (accept, wants.libc_accept),
        (
            Probe(
                "openssl_read",
                functions=(
                    ("stella_sr_ue", "stella_sr_ux", "SSL_read"),
                    ("stella_srx_ue", "stella_srx_ux", "SSL_read_ex"),
                ),
                library="libssl",
            ),
            wants.openssl_read,
        ),
        (
            Probe(
                "openssl_write",
                functions=(
                    ("stella_sw_ue", "stella_sw_ux", "SSL_write"),
                    ("stella_swx_ue", "stella_swx_ux", "SSL_write_ex"),
                ),
                library="libssl",
            ),
            wants.openssl_write,
        ),
    ]


class ProbeState(msgspec.Struct):
    """What became of a probe: `attached`, or the reason and the fix.  `scope` is node or process."""

    name: str
    attach_point: str
    wanted: bool
    attached: bool = False
    kernel: bool = True
    permission: bool = True
    reason: str = ""
    fix: str = ""
    scope: str = "node"
