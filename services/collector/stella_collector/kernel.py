"""The probes on this kernel: load, attach, count, detach.

    with Kernel(signals, lib) as kernel:      # loads what is switched on; a probe that cannot, says why
        kernel.attach()
        kernel.ring.drain(…); kernel.counters()

A probe that fails does not stop the others; its state says what was refused and what would help.  A crash
here leaves nothing attached (links are file descriptors) and the lanes' counters pinned, for the next
collector to close the books of this run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import ipaddress
import logging
import mmap
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from stella_collector import targets
from stella_collector.accounting import LANE_STRIDE
from stella_collector.libbpf import NATIVE, Libbpf, Link, Object
from stella_collector.naming import KernelProgram
from stella_collector.ring import open_ring
from stella_shared.config import Signals
from stella_shared.errors import NotFound, NotPermitted, StellaError
from stella_shared.events import text
from stella_shared.patterns import compile_paths
from stella_shared.wire import LANE_KINDS

log = logging.getLogger(__name__)

OBJECT: Final = NATIVE / "stella.bpf.o"
TRACEFS: Final = Path("/sys/kernel/tracing")
BPFFS: Final = Path("/sys/fs/bpf")
BTF: Final = Path("/sys/kernel/btf/vmlinux")
#: Every batch names the libraries, and a traced process may map files of any name: bounded in number and length.
LIBRARIES_MAX: Final = 64
LIBRARY_NAME_MAX: Final = 256
_RATE_WINDOWS_PER_SECOND: Final = 10
_PATH_KEY_BYTES: Final = 252
#: struct stella_program and struct stella_cgroup, without their paths, which end at WALK_MAX of WALK_ROOM bytes.
PROGRAM_HEAD: Final = struct.Struct("<QIHBB")
CGROUP_HEAD: Final = struct.Struct("<HBBI")
CONFIG: Final = struct.Struct("<6IQ2I")
WALK_MAX, WALK_ROOM = 512, 768
#: Follows new cgroups for target containers; no probe of the configuration.
_MKDIR: Final = "stella_mkdir"
_LIBSSL = re.compile(r"/libssl[-.][^/ ]*so[^/ ]*$|/libssl\.so[^/ ]*$")
_LIBSSL_GLOBS: Final = (
    "/lib/*-linux-gnu/libssl.so.*",
    "/usr/lib/*-linux-gnu/libssl.so.*",
    "/usr/lib64/libssl.so.*",
    "/usr/lib/libssl.so.*",
    "/usr/local/lib/libssl.so.*",
)
_LIBC_GLOBS: Final = ("/lib/*-linux-gnu/libc.so.6", "/usr/lib64/libc.so.6", "/lib/ld-musl-*.so.1")


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
            return ", ".join(f"{category}/{event}" for _, category, event, _ in self.tracepoints if "_enter_" in event)
        return ", ".join(f"{self.library}:{function}" for *_, function in self.functions)


def _syscall(program: str, call: str, needed: bool = True) -> tuple[tuple[str, str, str, bool], ...]:
    # The exit side first: an entry whose exit is not watched yet would be remembered for nothing.
    return (
        (f"{program}_ex", "syscalls", f"sys_exit_{call}", needed),
        (f"{program}_en", "syscalls", f"sys_enter_{call}", needed),
    )


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
        (Probe("sched_process_exec", btf=("stella_exec", "sched_process_exec")), wants.sched_process_exec),
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


def _mount(kind: str, where: Path) -> None:
    # Bare machines and containers often lack these; with CAP_SYS_ADMIN it is one call to help ourselves.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), os.fsencode(where), kind.encode(), 0, None):
        number = ctypes.get_errno()
        if number != errno.EBUSY:
            log.debug("cannot mount %s on %s: %s", kind, where, os.strerror(number))


def ensure_mounts() -> None:
    """Mount tracefs and the bpf file system where they are missing and we may."""
    if not (TRACEFS / "events").is_dir():
        _mount("tracefs", TRACEFS)
    if BPFFS.is_dir() and not os.path.ismount(BPFFS):
        _mount("bpf", BPFFS)


def tracefs_ready() -> bool:
    """Whether tracepoints can be found."""
    return (TRACEFS / "events").is_dir() or Path("/sys/kernel/debug/tracing/events").is_dir()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, "" when it cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return ""


def _address_key(network: str) -> bytes:
    parsed = ipaddress.ip_network(network, strict=False)
    if parsed.version == 4:
        return struct.pack("<I", 96 + parsed.prefixlen) + b"\0" * 10 + b"\xff\xff" + parsed.network_address.packed
    return struct.pack("<I", parsed.prefixlen) + parsed.network_address.packed


def _path_key(prefix: bytes) -> bytes:
    return struct.pack("<I", len(prefix) * 8) + prefix.ljust(_PATH_KEY_BYTES, b"\0")


class Kernel:
    """The loaded programs, their maps and links.  One owner, one thread at a time."""

    def __init__(self, signals: Signals, lib: Libbpf, *, watch_nothing: bool = False) -> None:
        if not OBJECT.exists():
            raise NotFound("the BPF object is not built", hint="run `make install` in the source tree (it needs clang)")
        if not BTF.exists():
            raise NotFound("this kernel has no BTF (/sys/kernel/btf/vmlinux)", hint="CONFIG_DEBUG_INFO_BTF=y is needed")
        ensure_mounts()
        self._signals = signals
        self._lib = lib
        self.lanes = lib.possible_cpus() * LANE_KINDS
        self._scoped = watch_nothing or targets.any_wanted(signals)
        self._probes = probes_of(signals)
        self.states = [ProbeState(p.name, p.attach_point(), wanted) for p, wanted in self._probes]
        for (_, wanted), state in zip(self._probes, self.states, strict=True):
            if not wanted:
                state.reason = "switched off in the configuration"
        self._links: dict[str, list[Link]] = {}
        self._uprobed: set[tuple[int, int, int]] = set()
        self.libraries: list[str] = []
        self._object = self._load([p for p, wanted in self._probes if wanted])
        self.ring = open_ring(lib, self._object.map_fd("stella_ring"), signals.ring_buffer_size, self.lanes)
        span = -(-self.lanes * LANE_STRIDE // mmap.PAGESIZE) * mmap.PAGESIZE
        self._lanes_map = mmap.mmap(self._object.map_fd("stella_lanes"), span, mmap.MAP_SHARED, mmap.PROT_READ)
        self._levels = 0
        self._targets: set[int] = set()

    # ---- loading

    def _open(self, wanted: Iterable[Probe]) -> Object:
        signals = self._signals
        obj = Object(self._lib, OBJECT)
        names = {name for probe in wanted for name in probe.programs()}
        if signals.filters.target_containers:
            names.add(_MKDIR)
        for name, program in obj.programs.items():
            program.set_autoload(name in names)
        obj.set_max_entries("stella_ring", signals.ring_buffer_size)
        obj.set_max_entries("stella_lanes", self.lanes)
        paths = compile_paths(signals.filters.paths.allowlist, signals.filters.paths.denylist, _PATH_KEY_BYTES)
        networks = signals.filters.networks
        obj.set_data(
            ".rodata",
            CONFIG.pack(
                self._scoped,
                not paths.allow_all,
                bool(paths.deny_prefixes),
                bool(networks.allowlist),
                bool(networks.denylist),
                signals.probes.kernel_paths == "always",
                -(-signals.max_events_per_second // _RATE_WINDOWS_PER_SECOND),
                targets.v1_hierarchy(),
                0,
            ),
        )
        try:
            obj.load()
        except StellaError:
            obj.close()
            raise
        if not paths.allow_all:
            for prefix in paths.allow_prefixes:
                obj.update("path_allow", _path_key(prefix), b"\1")
        for prefix in paths.deny_prefixes:
            obj.update("path_deny", _path_key(prefix), b"\1")
        for network in networks.allowlist:
            obj.update("network_allow", _address_key(network), b"\1")
        for network in networks.denylist:
            obj.update("network_deny", _address_key(network), b"\1")
        for asked in signals.filters.target_containers:
            obj.update("stella_target_names", targets.name_key(asked), b"\1")
        return obj

    def _load(self, wanted: list[Probe]) -> Object:
        try:
            return self._open(wanted)
        except NotPermitted:
            raise
        except StellaError as whole:
            # One program that this kernel cannot take must not cost the others: find out which, go without.
            good = []
            for probe in wanted:
                try:
                    self._open([probe]).close()
                    good.append(probe)
                except StellaError as e:
                    state = self._state(probe.name)
                    state.kernel, state.reason = False, str(e)
                    state.fix = "this kernel does not offer what the probe needs"
            if not good:
                raise whole
            return self._open(good)

    def _state(self, name: str) -> ProbeState:
        return next(state for state in self.states if state.name == name)

    # ---- attaching

    def attach(self) -> None:
        """Attach every wanted probe of the node.  Those that fail carry the reason in their state."""
        for probe, wanted in self._probes:
            state = self._state(probe.name)
            if not wanted or not state.kernel or probe.library == "libssl":
                continue
            try:
                self._links[probe.name] = self._attach_node(probe)
                state.attached = True
            except StellaError as e:
                self._refused(state, e)
        if self._signals.filters.target_containers:
            # Without it a container that starts later is found by looking, a quarter of a second late.
            with contextlib.suppress(StellaError):
                self._links[_MKDIR] = [self._object.programs[_MKDIR].attach("tp_btf/cgroup_mkdir")]
        self.refresh_libraries()

    def _refused(self, state: ProbeState, error: StellaError) -> None:
        state.reason, state.fix = str(error), error.hint
        state.permission = not isinstance(error, NotPermitted)
        state.kernel = not isinstance(error, NotFound)
        if isinstance(error, NotFound) and not tracefs_ready():
            state.fix = "mount tracefs: mount -t tracefs tracefs /sys/kernel/tracing"
        log.error("%s", error, extra={"probe": state.name, "fix": state.fix})

    def _attach_node(self, probe: Probe) -> list[Link]:
        links: list[Link] = []
        programs = self._object.programs
        try:
            if probe.btf:
                links.append(programs[probe.btf[0]].attach(f"tp_btf/{probe.btf[1]}"))
            for program, category, event, needed in probe.tracepoints:
                try:
                    links.append(programs[program].attach_tracepoint(category, event))
                except NotFound:
                    if needed:
                        raise
            if probe.functions:
                libc = next((hit for pattern in _LIBC_GLOBS for hit in sorted(glob.glob(pattern))), None)
                if libc is None:
                    raise NotFound("no libc was found to attach to", hint="use probes.libc_source: syscall")
                links += self._attach_functions(probe, libc, -1, 0)
        except StellaError:
            for link in links:
                link.close()
            raise
        return links

    def _attach_functions(self, probe: Probe, path: str, pid: int, cookie: int) -> list[Link]:
        links: list[Link] = []
        programs = self._object.programs
        missing: StellaError | None = None
        for entry, returning, function in probe.functions:
            try:
                links.append(programs[returning].attach_uprobe(path, function, pid=pid, returning=True, cookie=cookie))
                links.append(programs[entry].attach_uprobe(path, function, pid=pid, returning=False, cookie=cookie))
            except NotFound as e:  # OpenSSL 1.0 has no *_ex
                missing = e
        if not links and missing:
            raise missing
        return links

    # ---- TLS libraries: found on disk, and in what is running

    def attach_libraries_of_node(self) -> None:
        """Attach to the TLS libraries on disk whatever the targets are, to see whether that works."""
        self._scoped = False
        for state in self.states:
            if not state.attached and state.wanted and state.scope == "process":
                state.reason = ""
        self.refresh_libraries()

    def refresh_libraries(self) -> bool:
        """Attach to TLS libraries not seen before; return whether anything changed.

        With targets, only their processes pay for it: a uprobe of the whole node would tax every process.
        TLS calls that a process makes before it was seen (looked for every 250 ms) are
        outside the coverage, which says `scope: process`.
        """
        wanted = [p for p, on in self._probes if on and p.library == "libssl" and self._state(p.name).kernel]
        if not wanted:
            return False
        configured = list(self._signals.probes.openssl_libraries)
        if self._scoped:
            found = [
                (pid, path) for pid in targets.processes(self._targets) for path in _mapped_libraries(pid, configured)
            ]
        else:
            on_disk = configured or sorted({os.path.realpath(p) for g in _LIBSSL_GLOBS for p in glob.glob(g)})
            found = [(-1, path) for path in on_disk]
        changed = False
        for pid, path in found:
            try:
                stat = os.stat(path)
            except OSError:
                continue
            key = (pid, stat.st_dev, stat.st_ino)
            if key in self._uprobed:
                continue
            self._uprobed.add(key)
            name = re.sub(r"^/proc/\d+/root(?=/)", "", path)[:LIBRARY_NAME_MAX]
            if name not in self.libraries:
                if len(self.libraries) >= LIBRARIES_MAX:
                    log.warning("more than %d TLS libraries: %s is not watched", LIBRARIES_MAX, name)
                    continue
                self.libraries.append(name)
            cookie = self.libraries.index(name)
            for probe in wanted:
                state = self._state(probe.name)
                try:
                    links = self._attach_functions(probe, path, pid, cookie)
                except StellaError as e:
                    if not state.attached:
                        self._refused(state, e)
                    continue
                self._links.setdefault(f"{probe.name}:{pid}", []).extend(links)
                state.attached, state.reason, state.fix = True, "", ""
                changed = True
        alive = {pid for pid, _ in found}
        for key in [k for k in self._uprobed if k[0] > 0 and k[0] not in alive and not Path(f"/proc/{k[0]}").exists()]:
            self._uprobed.discard(key)
            for probe in wanted:
                for link in self._links.pop(f"{probe.name}:{key[0]}", []):
                    link.close()
        for probe in wanted:
            state = self._state(probe.name)
            state.scope = "process" if self._scoped else "node"
            if not state.attached and not state.reason:
                state.reason = "no target process uses a TLS library yet" if self._scoped else "no libssl on this node"
                state.fix = "" if self._scoped else "name the library in probes.openssl_libraries"
                changed = True
        return changed

    # ---- targets

    def set_targets(self, found: list[targets.Target]) -> bool:
        """Tell the programs who is watched; return whether that changed."""
        ids = {t.id for t in found if t.id}
        levels = 0
        for t in found:
            if t.id and t.level >= 0:
                levels |= 1 << t.level
        if ids == self._targets and levels == self._levels:
            return False
        for new in ids - self._targets:
            self._object.update("stella_targets", struct.pack("<Q", new), b"\1")
        for old in self._targets - ids:
            self._object.delete("stella_targets", struct.pack("<Q", old))
        namespaces = sum(1 for t in found if t.id and t.level < 0)
        self._object.update(".bss", struct.pack("<I", 0), struct.pack("<QQ", levels, namespaces))
        self._targets, self._levels = ids, levels
        return True

    # ---- names

    def cgroup(self, cgroup: int) -> str | None:
        """Return the path of a cgroup in which something was recorded, None when it was forgotten."""
        found = self._object.lookup("stella_cgroups", struct.pack("<Q", cgroup), CGROUP_HEAD.size + WALK_ROOM)
        if found is None:
            return None
        at, _, ready, _ = CGROUP_HEAD.unpack_from(found)
        return _walked(found, CGROUP_HEAD.size, at) if ready else None

    def program(self, key: int) -> KernelProgram | None:
        """Return the program behind a key, None when it was forgotten."""
        found = self._object.lookup("stella_programs", struct.pack("<Q", key), PROGRAM_HEAD.size + WALK_ROOM)
        if found is None:
            return None
        inode, device, at, flags, ready = PROGRAM_HEAD.unpack_from(found)
        return KernelProgram(_walked(found, PROGRAM_HEAD.size, at), device, inode, flags) if ready else None

    # ---- counters

    def counters(self) -> bytes:
        """Return the lanes' counters as they stand, one row of 128 bytes a lane."""
        return self._lanes_map[: self.lanes * LANE_STRIDE]

    def missed(self) -> int:
        """Return how many program runs the kernel skipped because the program was already running there."""
        return sum(
            self._object.programs[name].recursion_misses()
            for probe, wanted in self._probes
            if wanted and self._state(probe.name).attached
            for name in probe.programs()
        )

    def pin_counters(self, path: Path) -> None:
        """Pin the lanes at `path`, so that a successor can close this run's books."""
        self._object.pin("stella_lanes", path)

    # ---- the end

    def detach(self) -> None:
        """Detach everything; what was recorded stays in the ring.  Entry sides go before exit sides."""
        for links in self._links.values():
            for link in reversed(links):
                link.close()
        self._links.clear()

    def close(self) -> None:
        """Detach, and give programs and maps back."""
        self.detach()
        self.ring.close()
        self._lanes_map.close()
        self._object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _walked(value: bytes, head: int, at: int) -> str:
    return text(value[head + at : head + WALK_MAX])


def _mapped_libraries(pid: int, configured: list[str]) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    except OSError:
        return []  # it is gone, or not ours to look at
    seen = {line.split(None, 5)[5] for line in text.splitlines() if line.count("/")}
    return [
        f"/proc/{pid}/root{path}" if os.path.exists(f"/proc/{pid}/root{path}") else path
        for path in sorted(seen)
        if path in configured or _LIBSSL.search(path)
    ]
