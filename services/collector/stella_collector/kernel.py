"""The probes on this kernel: load, attach, count, detach.

    with Kernel(signals, lib) as kernel:      # loads what is switched on; a probe that cannot, says why
        kernel.attach()
        kernel.ring.drain(…); kernel.counters()

A probe that fails does not stop the others; its state says what was refused and what would help.

    kernel.pin(folder); kernel.attach()                # from here on the probes of the node outlive this process
    Kernel(signals, lib, adopted=Adopted(…))           # the next process goes on with them: nothing is loaded

Probes in files are not pinned: whoever goes on looks for the files anew (docs/decisions/0017-hitless-restart.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import logging
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from stella_collector import targets
from stella_collector.binaries.attaching import FUNCTIONS_MAX
from stella_collector.binaries.choosing import Library
from stella_collector.binaries.watch import Binaries
from stella_collector.filtering import Filtering
from stella_collector.libbpf import NATIVE, Libbpf
from stella_collector.objects import LINK_PIN, Link, Maps, Object, Pinned
from stella_collector.probes import Probe, ProbeState, probes_of
from stella_collector.reading import Reading
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound, NotPermitted, StellaError
from stella_shared.wire import LANE_KINDS

log = logging.getLogger(__name__)

OBJECT: Final = NATIVE / "stella.bpf.o"
TRACEFS: Final = Path("/sys/kernel/tracing")
BPFFS: Final = Path("/sys/fs/bpf")
BTF: Final = Path("/sys/kernel/btf/vmlinux")
#: Counters of watched functions at one time: processes times functions that they have called.
COUNTERS_MAX: Final = 65_536
#: Programs beside the probes: each is loaded where the kernel takes it.
_NOTICE_PROGRAMS: Final = ("stella_note_exec", "stella_note_map", "stella_real_inode")
_FUNCTION_PROGRAMS: Final = (
    "stella_fn_trace", "stella_fn_count", "stella_fn_trace1", "stella_fn_count1", "stella_fn_flush", "stella_fn_exit",
)  # fmt: skip
_RUNBOOK: Final = "issue-probe-failed-to-attach"
#: struct stella_scope.
_LEVELS: Final = struct.Struct("<QQ")
#: Count what is asked for through io_uring, past every probe: rings made, opens, connects, accepts.
URING: Final = {"stella_uring_made": "io_uring_create", "stella_uring_asked": "io_uring_submit_req"}
_URING_COUNTS: Final = struct.Struct("<4Q")
#: Follows new cgroups for target containers; no probe of the configuration.
_MKDIR: Final = "stella_mkdir"
#: Tells when a limit has ceased to cost records; run by us.
_LIMITS: Final = "stella_limits"
_LIBSSL_GLOBS: Final = (
    "/lib/*-linux-gnu/libssl.so.*",
    "/usr/lib/*-linux-gnu/libssl.so.*",
    "/usr/lib64/libssl.so.*",
    "/usr/lib/libssl.so.*",
    "/usr/local/lib/libssl.so.*",
)
_LIBC_GLOBS: Final = ("/lib/*-linux-gnu/libc.so.6", "/usr/lib64/libc.so.6", "/lib/ld-musl-*.so.1")


def _mount(kind: str, where: Path) -> None:
    # Bare machines and containers often lack these; with CAP_SYS_ADMIN it is one call to help ourselves.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), os.fsencode(where), kind.encode(), 0, None):
        number = ctypes.get_errno()
        if number != errno.EBUSY:
            log.debug("cannot mount %s on %s: %s", kind, where, os.strerror(number))


def ensure_mounts() -> None:
    """Mount tracefs and the bpf file system where they are missing and we may."""
    if not tracefs_ready():
        _mount("tracefs", TRACEFS)
    if BPFFS.is_dir() and not os.path.ismount(BPFFS):
        _mount("bpf", BPFFS)


def tracefs_ready() -> bool:
    """Whether tracepoints can be found, for all we are allowed to see: to most users tracefs is closed."""
    return _may_be(TRACEFS / "events") or _may_be(Path("/sys/kernel/debug/tracing/events"))


def _may_be(directory: Path) -> bool:
    try:
        return directory.is_dir()
    except PermissionError:
        return directory == TRACEFS / "events"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, "" when it cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return ""


class Adopted(msgspec.Struct, frozen=True):
    """What a former collector left attached, and what only it knew."""

    folder: Path
    pinned: Pinned
    states: list[ProbeState]
    extras: tuple[str, ...]
    libraries: list[str]


def shape_of(signals: Signals, lib: Libbpf) -> str:
    """Return the digest of all that is fixed when the programs are loaded: who has the same may go on with them."""
    functions = signals.probes.functions
    fixed = (
        sha256_of(OBJECT),
        lib.possible_cpus(),
        signals.ring_buffer_size,
        targets.any_wanted(signals),
        [(probe.name, probe.programs(), wanted) for probe, wanted in probes_of(signals)],
        bool(functions),
        any(entry.mode == "count" for entry in functions),
    )
    return hashlib.sha256(msgspec.json.encode(fixed)).hexdigest()


class Kernel(Reading):
    """The loaded programs, their maps and links.  One owner, one thread at a time."""

    def __init__(
        self, signals: Signals, lib: Libbpf, *, watch_nothing: bool = False, adopted: Adopted | None = None
    ) -> None:
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
        self._folder: Path | None = None
        self._extras: tuple[str, ...] = ()
        self._object: Maps
        if adopted is None:
            self._object = self._load([p for p, wanted in self._probes if wanted])
        else:
            self._object = adopted.pinned
            self._take_over(adopted)
        self._filtering = Filtering(self._object)
        self._filtering.apply(signals, scoped=self._scoped)
        loaded = [p for p, wanted in self._probes if wanted and self._state(p.name).kernel]
        self.binaries = Binaries(
            signals,
            lib,
            self._object,
            wanted=[Library(p.name, p.library, p.functions) for p in loaded if p.library],
            states=self.states,
            refused=self._refused,
            scoped=self._scoped,
            loaded=self._extras,
            own_libraries=self._libraries_on_disk,
            known_libraries=adopted.libraries if adopted else [],
        )
        super().__init__(lib, self._object, self.lanes, signals.ring_buffer_size)
        self._targets = {int.from_bytes(key, "little") for key in self._object.keys("stella_targets", 8)}
        self._levels = _LEVELS.unpack(self._object.lookup(".bss", bytes(4), _LEVELS.size) or bytes(16))[0]

    # ---- what outlives a process

    def pin(self, folder: Path) -> None:
        """Have all of it, and what `attach` will attach to the node, outlive this process.  Before `attach`.

        From here on `detach` alone detaches the node's probes: an error that ends this process leaves them.
        Raises what the kernel says.
        """
        self._object.pin(folder)
        self._folder = folder

    def pin_counters(self, path: Path) -> None:
        """Have the lanes' counters alone outlive this process."""
        self._lib.pin(self._object.map_fd("stella_lanes"), path)

    def links(self) -> list[str]:
        """Return the names of the links that are pinned."""
        return [link.pinned.name for links in self._links.values() for link in links if link.pinned]

    @property
    def extras(self) -> tuple[str, ...]:
        """Programs that are loaded beside those of the probes."""
        return self._extras

    def _take_over(self, adopted: Adopted) -> None:
        self._folder, self._extras = adopted.folder, adopted.extras
        known = {state.name: state for state in adopted.states}
        self.states = [known.get(state.name, state) for state in self.states]
        for probe, wanted in self._probes:
            state = self._state(probe.name)
            if wanted and probe.library == "libssl" and state.attached:
                state.attached, state.reason = False, "the collector was restarted and looks for the files anew"
        for name, link in adopted.pinned.links.items():
            self._links.setdefault(name.removeprefix(LINK_PIN).rpartition("-")[0], []).append(link)

    # ---- loading

    def _open(self, wanted: Iterable[Probe], extras: Iterable[str] = ()) -> Object:
        signals = self._signals
        obj = Object(self._lib, OBJECT)
        names = {name for probe in wanted for name in probe.programs()} | set(extras)
        if self._scoped:
            names.add(_MKDIR)
        names.add(_LIMITS)
        for name, program in obj.programs.items():
            program.set_autoload(name in names)
        obj.set_max_entries("stella_ring", signals.ring_buffer_size)
        obj.set_max_entries("stella_lanes", self.lanes)
        if signals.probes.functions:
            obj.set_max_entries("stella_functions", FUNCTIONS_MAX)
        if any(entry.mode == "count" for entry in signals.probes.functions):
            obj.set_max_entries("stella_counts", COUNTERS_MAX)
            obj.set_max_entries("stella_counted", COUNTERS_MAX // 4)
        try:
            obj.load()
        except StellaError:
            obj.close()
            raise
        return obj

    def _load(self, wanted: list[Probe]) -> Object:
        functions = bool(self._signals.probes.functions)
        self._extras = _FUNCTION_PROGRAMS if functions else ()
        if functions or any(probe.library for probe in wanted):
            self._extras += _NOTICE_PROGRAMS
        self._extras += tuple(URING)
        try:
            return self._open(wanted, self._extras)
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
            self._extras = tuple(name for name in self._extras if self._takes(name))
            if not good and not set(self._extras) - set(URING):
                raise whole
            return self._open(good, self._extras)

    def _takes(self, program: str) -> bool:
        try:
            self._open([], [program]).close()
        except StellaError as e:
            log.warning("this kernel does not take program %s: %s", program, e)
            return False
        return True

    def _state(self, name: str) -> ProbeState:
        return next(state for state in self.states if state.name == name)

    # ---- attaching

    def attach(self) -> None:
        """Attach every wanted probe.  Those that fail carry the reason in their state."""
        self.attach_node()
        self.watch_files()

    def attach_node(self) -> None:
        """Attach every wanted probe but those in files."""
        for probe, wanted in self._probes:
            state = self._state(probe.name)
            if not wanted or not state.kernel or probe.library == "libssl":
                continue
            try:
                self._links[probe.name] = self._attach_node(probe)
                state.attached = True
            except StellaError as e:
                self._refused(state, e)
        if self._scoped:
            # Without it a container that starts later is found by looking, a quarter of a second late.
            with contextlib.suppress(StellaError):
                self._links[_MKDIR] = [self._object.programs[_MKDIR].attach("tp_btf/cgroup_mkdir")]
        for name, event in URING.items():
            if name in self._extras:
                with contextlib.suppress(StellaError):
                    self._links[name] = [self._object.programs[name].attach(f"tp_btf/{event}")]
        if self._folder is not None:
            for key, links in self._links.items():
                for index, link in enumerate(links):
                    link.pin(self._folder / f"{LINK_PIN}{key}-{index}")

    def watch_files(self) -> None:
        """Attach to the files that are there, and begin to hear of new ones.  May take long."""
        self.binaries.begin(self._targets)

    def _refused(self, state: ProbeState, error: StellaError) -> None:
        state.reason, state.fix = str(error), error.hint
        state.permission = not isinstance(error, NotPermitted)
        state.kernel = not isinstance(error, NotFound)
        if isinstance(error, NotFound) and not tracefs_ready():
            state.fix = "mount tracefs: mount -t tracefs tracefs /sys/kernel/tracing"
        log.error("%s", error, extra={"probe": state.name, "fix": state.fix, "runbook": _RUNBOOK})

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

    def _libraries_on_disk(self) -> list[str]:
        """Return the node's own TLS libraries: those that are configured, else what the usual folders have."""
        if not any(wanted and p.library == "libssl" for p, wanted in self._probes):
            return []
        configured = list(self._signals.probes.openssl_libraries)
        return configured or sorted({os.path.realpath(p) for g in _LIBSSL_GLOBS for p in glob.glob(g)})

    def attach_libraries_of_node(self) -> None:
        """Attach to the TLS libraries on disk whatever the targets are, to see whether that works."""
        for state in self.states:
            if not state.attached and state.wanted and state.scope == "process":
                state.reason = ""
        self.binaries.attach_own()

    @property
    def libraries(self) -> list[str]:
        return self.binaries.libraries

    # ---- filters, limits, targets

    def apply(self, signals: Signals) -> None:
        """Record by this configuration from now on.  Raises `ConfigError` when it is one that needs a new start."""
        if targets.any_wanted(signals) != self._scoped:
            raise ConfigError(
                "a running node cannot change between watching its targets and watching everything",
                hint="stop it and start it with the new configuration",
            )
        targets.resolve(signals)
        self._filtering.apply(signals, scoped=self._scoped)
        self._signals = signals

    def tell_limits(self) -> None:
        """Have the programs tell which limits have ceased to cost records."""
        self._object.programs[_LIMITS].run(bytearray(8))

    def uring(self) -> dict[str, int]:
        """Return what targets asked for through io_uring, which no probe sees; what cannot be counted is left out."""
        values = _URING_COUNTS.unpack(self._object.lookup("stella_uring", bytes(4), _URING_COUNTS.size) or bytes(32))
        counted = dict(zip(("ring", "open", "connect", "accept"), values, strict=True))
        if "stella_uring_asked" not in self._links:
            counted = {"ring": counted["ring"]}
        return counted if "stella_uring_made" in self._links else {}

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
        self._object.update(".bss", struct.pack("<I", 0), _LEVELS.pack(levels, namespaces))
        self._targets, self._levels = ids, levels
        return True

    @property
    def target_ids(self) -> set[int]:
        """The numbers of the targets that are there now."""
        return self._targets

    def name_targets(self, selected: Mapping[str, list[str]]) -> None:
        """Tell the programs which containers selectors match: their cgroups are watched from when they are made."""
        self._filtering.name(container for ids in selected.values() for container in ids)

    # ---- counters

    def counted(self) -> list[str]:
        return [
            name
            for probe, wanted in self._probes
            if wanted and self._state(probe.name).attached
            for name in probe.programs()
        ] + [name for name in self._extras if name.startswith("stella_fn")]

    def may_count(self) -> list[str]:
        """Return all that `counted` may return once more is attached."""
        wanted = [name for probe, wanted in self._probes if wanted for name in probe.programs()]
        return wanted + [name for name in self._extras if name.startswith("stella_fn")]

    def flush(self) -> int:
        return self.binaries.flush()

    def run_times(self, probe: str) -> list[tuple[int, int]]:
        """Return (nanoseconds, runs) of each program of a probe (`Libbpf.count_run_time`)."""
        names = next(p.programs() for p, _ in self._probes if p.name == probe)
        return [self._object.programs[name].run_time() for name in names]

    # ---- the end

    def detach(self) -> None:
        """Detach everything; what was recorded stays in the ring.  Entry sides go before exit sides.

        Counters of watched functions stay until `binaries.flush` has turned them into records.
        """
        self.binaries.detach()
        for links in self._links.values():
            for link in reversed(links):
                link.close()
        self._links.clear()

    def close(self) -> None:
        """Give programs and maps back.  What is pinned stays attached; the rest is detached."""
        self.binaries.close()
        if self._folder is None:
            self.detach()
        self.close_reading()
        self._object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
