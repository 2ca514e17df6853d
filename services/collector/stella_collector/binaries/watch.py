"""All probes at functions of files: found by inode, attached once for each, and let go when a file is gone.

    exec, dlopen ──notice──> look at that process ─┐
    every few seconds ────> look at everybody ─────┼─> a file not seen before ─> child reads it ─> attach ─> digest
    the node's own files ──> at the start ─────────┘

A watched function is probed in its file, for every process that maps it, and the programs filter: so a process that
begins later is seen from its first call.  TLS and libc probes are attached the same way to a container's own copies
and to programs that have the library linked in.  The node's own libssl, which is everybody's, is with targets
attached to the targets' processes alone (docs/decisions/0005-tls-scope.md).

What is attached is an open descriptor, so no path can lead elsewhere in between; the file's (device, inode) and time
of change are compared again once its digest is made, and at each later look.  One lock; methods may block.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from stella_collector import targets
from stella_collector.binaries import mapped
from stella_collector.binaries.attaching import FUNCTIONS_MAX, Attached, Prober, RealInode, Rows
from stella_collector.binaries.choosing import Chooser, Entry, Interest, Library
from stella_collector.binaries.mapped import FileId, Mapping, file_id
from stella_collector.binaries.notices import Notice, Notices
from stella_collector.binaries.question import Answer, Function, Matched, Patterns, Question, table_sha256
from stella_collector.binaries.reader import Reader
from stella_collector.libbpf import Libbpf, Link, Object
from stella_shared.config import Signals
from stella_shared.errors import StellaError

if TYPE_CHECKING:
    from stella_collector.kernel import ProbeState

log = logging.getLogger(__name__)
_Value = TypeVar("_Value")

#: Every batch names the libraries, and a traced process may map files of any name: bounded in number and length.
LIBRARIES_MAX: Final = 64
LIBRARY_NAME_MAX: Final = 256
#: Files that are watched at one time, and files that are told of because they could not be.
FILES_MAX: Final = 256
REFUSED_MAX: Final = 64
_DULL_MAX: Final = 65_536
#: Files of one glob that are attached before any process maps them.
_ON_DISK_MAX: Final = 64
#: What tells of new files and of processes that have ended, and the tracepoint where it does not name its own.
_TELLERS: Final = (("stella_note_exec", ""), ("stella_note_map", "sys_exit_mmap"), ("stella_fn_exit", ""))
#: A container's file, or one without a name, is let go when nobody has mapped it for so long.
_UNUSED_SECONDS: Final = 60.0


class BinaryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file and one reason to watch it, for the evidence and for people.

    `mode` is trace or count for watched functions, else the built-in probe.  `table_sha256` is the digest of the
    sorted (offset, symbol) table.  `functions` 0 with a `reason`: not attached.
    """

    binary: str
    mode: str
    functions: int
    build_id: str = ""
    image: str = ""
    reason: str = ""
    sha256: str = ""
    skipped: dict[str, int] = {}
    table_sha256: str = ""


class _File(msgspec.Struct):
    """A file with probes."""

    name: str
    descriptor: int
    id: FileId
    real: tuple[int, int]
    own: bool
    paths: tuple[str, ...]
    is_program: bool
    build_id: str = ""
    sha256: str = ""
    links: list[Link] = []
    rows: list[int] = []
    states: list[BinaryState] = []
    entries: list[int] = []
    #: Offsets that each process gets probes of its own for.
    per_process: tuple[tuple[Library, dict[str, int]], ...] = ()
    notice: bytes = b""
    used_at: float = 0.0


class Binaries:
    """The watched files.  `libraries` are the names that records refer to by index; it only grows."""

    def __init__(
        self,
        signals: Signals,
        lib: Libbpf,
        obj: Object,
        *,
        wanted: list[Library],
        states: list[ProbeState],
        refused: Callable[[ProbeState, StellaError], None],
        scoped: bool,
        loaded: Iterable[str],
        own_libraries: Callable[[], list[str]],
    ) -> None:
        names = set(loaded)
        self._signals = signals
        self._object = obj
        self._states = {state.name: state for state in states}
        self._tell_refused = refused
        self._own_libraries = own_libraries
        self.scoped = scoped
        self._chooser = Chooser(signals, wanted)
        self.active = bool(wanted or signals.probes.functions)
        self.libraries: list[str] = []
        self._lock = threading.RLock()
        self._flush_lock = threading.Lock()
        watching = bool(signals.probes.functions) and bool(names & {"stella_fn_trace", "stella_fn_trace1"})
        self._rows = Rows(obj, FUNCTIONS_MAX if watching else 0)
        self._prober = Prober(
            obj, many="stella_fn_trace" in names and obj.programs["stella_fn_trace"].takes_uprobe_multi()
        )
        self._can_flush = "stella_fn_flush" in names
        self._real = RealInode(obj)
        self._real.works = "stella_real_inode" in names
        self._reader = Reader()
        self.notices = Notices(lib, obj) if "stella_note_exec" in names else None
        self._links: list[Link] = []
        self._files: dict[FileId, _File] = {}
        self._alias: dict[FileId, FileId] = {}
        self._dull: dict[FileId, None] = {}
        self._per_process: dict[int, tuple[dict[FileId, list[Link]], str]] = {}
        self._refused: dict[tuple[str, str], tuple[BinaryState, int]] = {}
        self._ids: set[int] = set()
        #: Microseconds from the kernel's notice to attached, the last few.
        self.delays_us: list[int] = []
        if self.active:
            self._reader.start()

    # ---- what there is

    def states(self) -> list[BinaryState]:
        """Return every watched file, and those that are not although they were asked for."""
        with self._lock:
            found = [state for file in self._files.values() for state in file.states]
            refused = [state for state, _ in self._refused.values()]
            return sorted([*found, *refused, *self._missing()], key=msgspec.json.encode)

    # ---- attaching the programs that tell us, and letting go

    def begin(self, ids: Iterable[int]) -> None:
        """Attach what brings notices, then look at all there is.  `ids` are the targets' cgroup ids."""
        self._ids = set(ids)
        if not self.active:
            return
        for name, where in _TELLERS:
            if self.notices is None or (name == "stella_fn_exit" and not self._rows.count):
                continue
            program = self._object.programs[name]
            try:
                self._links.append(program.attach_tracepoint("syscalls", where) if where else program.attach(name))
            except StellaError as e:
                log.warning("new processes are found by looking every few seconds only: %s", e)
        self.scan()

    def attach_own(self) -> None:
        """Attach to the node's own files whatever the targets are, to see whether that works."""
        with self._lock:
            self.scoped = False
            self._look_on_disk()
            self._say_what_is_missing()

    def detach(self) -> None:
        """Detach everything.  Counters keep what they have until they are flushed."""
        with self._lock:
            for link in self._links:
                link.close()
            self._links.clear()
            for links, _ in self._per_process.values():
                for link in (link for group in links.values() for link in reversed(group)):
                    link.close()
            self._per_process.clear()
            for file in self._files.values():
                for link in reversed(file.links):
                    link.close()
                file.links = []

    def close(self) -> None:
        """Detach, end the reader, close every file."""
        self.detach()
        with self._lock:
            self._reader.close()
            if self.notices is not None:
                self.notices.close()
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    def flush(self) -> int:
        """Turn counters into records; return how many found no room in the ring and wait."""
        if not self._can_flush or not self._rows.count:
            return 0
        with self._flush_lock:
            context = bytearray(16)
            self._object.programs["stella_fn_flush"].run(context)
            return int.from_bytes(context[8:16], "little")

    # ---- looking

    def look_at_notices(self) -> bool:
        """Look at the processes that the kernel has told of; return whether anything changed."""
        if self.notices is None:
            return False
        with self._lock:
            told = self.notices.take()
            changed = False
            by_pid: dict[int, list[Notice]] = {}
            for notice in told:
                by_pid.setdefault(notice.pid, []).append(notice)
            for pid, notices in by_pid.items():
                before = len(self._files)
                changed |= self._look(pid, {}, notices)
                if len(self._files) > before:
                    self.delays_us = [*self.delays_us[-99:], (_boottime_ns() - notices[0].ts_ns) // 1000]
            if self.notices.missed():
                changed |= self.scan()
            return changed

    def recheck(self) -> bool:
        """Compare watched files with what they were, look at the node's own; return whether anything changed."""
        with self._lock:
            changed = False
            for file in list(self._files.values()):
                if file_id(os.fstat(file.descriptor)) != file.id:
                    changed |= self._renew(file)
            return self._look_on_disk() or changed

    def scan(self, ids: Iterable[int] | None = None) -> bool:
        """Look at every process in scope and at the node's own files; return whether anything changed."""
        if not self.active:
            return False
        with self._lock:
            if ids is not None:
                self._ids = set(ids)
            before = len(self._files), len(self._refused)
            changed = self.recheck()
            pids = targets.processes(self._ids) if self.scoped else mapped.everybody()
            known: dict[tuple[int, int], FileId | None] = {}
            for pid in pids:
                changed |= self._look(pid, known, [])
            self._let_go(set(pids))
            self._say_what_is_missing()
            return changed or before != (len(self._files), len(self._refused))

    def _look(self, pid: int, known: dict[tuple[int, int], FileId | None], notices: list[Notice]) -> bool:
        """Look at what a process has mapped.  `known` spares looking at a file twice in one round."""
        changed = False
        told = {int.from_bytes(n.file[:8], "little"): n.file for n in notices}
        program = mapped.program(pid)
        for mapping in mapped.mappings(pid):
            place = mapping.device, mapping.inode
            if place not in known:
                known[place] = mapped.version(mapping)
            version = known[place]
            if version is None:
                continue
            notice = told.pop(mapping.inode, b"")
            if version in self._dull:
                continue
            file = self._files.get(self._alias.get(version, version))
            if file is None:
                changed |= self._meet(mapping, is_program=(version.device, version.inode) == program)
                file = self._files.get(self._alias.get(version, version))
            if file is None:
                continue
            file.used_at = time.monotonic()
            if notice:
                file.notice = notice
                if file.per_process and self.notices is not None:
                    self.notices.tell_each(notice)
            changed |= self._attach_process(file, pid)
        if self.notices is not None:
            for gone in told.values():  # the process has ended before we looked: the next one is to be told of
                self.notices.forget(gone)
        return changed

    def _meet(self, mapping: Mapping, *, is_program: bool) -> bool:
        """Look at a file for the first time; return whether anything changed."""
        try:
            descriptor = mapped.open_mapped(mapping)
        except OSError:
            return False
        status = os.fstat(descriptor)
        own = mapped.is_own(mapping, status)
        paths = tuple(dict.fromkeys(mapped.path_for_process(mapping)))
        return self._consider(descriptor, paths, own=own, is_program=is_program)

    def _look_on_disk(self) -> bool:
        """Attach to the node's own files before anybody runs them, where the node's own processes are watched."""
        filters = self._signals.filters
        eager = not self.scoped or bool(filters.target_cgroups or filters.target_namespaces)
        paths = [] if self.scoped else self._own_libraries()
        if eager:
            paths += [
                path
                for entry in self._chooser.entries
                if entry.glob and not entry.asked.image
                for path in mapped.on_disk(entry.glob, _ON_DISK_MAX)
            ]
        changed = False
        for path in dict.fromkeys(paths):
            try:
                version = file_id(os.stat(path))
                if version in self._dull or version in self._files or version in self._alias:
                    continue
                descriptor = mapped.open_regular(path)
            except OSError:
                continue
            changed |= self._consider(descriptor, (path, os.path.realpath(path)), own=True, is_program=False)
        return changed

    # ---- one file

    def _consider(self, descriptor: int, paths: tuple[str, ...], *, own: bool, is_program: bool) -> bool:
        """Take over an open file: watch it, or close it and remember that it is dull."""
        version = file_id(os.fstat(descriptor))
        interest = self._chooser.interest(paths, own=own, is_program=is_program)
        file: _File | None = None
        try:
            if not interest:
                return False
            real = self._real.of(descriptor)
            for other in self._files.values():
                if other.real == real and other.id.changed_ns == version.changed_ns:
                    _remember(self._alias, version, other.id)
                    return False
            if len(self._files) >= FILES_MAX:
                self._refuse(paths[0], interest, f"more than {FILES_MAX} files are watched already")
                return True
            file = _File(
                paths[0][:LIBRARY_NAME_MAX], descriptor, version, real, own, paths, is_program,
                used_at=time.monotonic(),
            )  # fmt: skip
            if not self._attach(file, interest):
                file = None
                return bool(interest.entries)
            self._files[version] = file
            return True
        finally:
            if file is None:
                os.close(descriptor)
                if version not in self._alias:
                    _remember(self._dull, version, None)

    def _attach(self, file: _File, interest: Interest) -> bool:
        """Attach to a file what is wanted of it; return whether there was anything."""
        names = sorted({function for library in interest.libraries for *_, function in library.functions})
        question = Question(
            [Patterns(e.number, list(e.asked.functions)) for e in interest.entries], names, self._rows.left
        )
        answer = self._reader.ask(file.descriptor, question)
        entries = {e.number: e for e in interest.entries if e.build_id in ("", answer.build_id)}
        if answer.reason:
            by_path = Interest(tuple(e for e in interest.entries if not e.build_id), ())
            self._refuse(file.name, by_path, answer.reason)
            if not file.is_program:
                self._refuse_libraries(interest.libraries, f"{file.name}: {answer.reason}")
            return False
        file.build_id = answer.build_id
        for matched in answer.matched:
            if matched.entry in entries:
                self._attach_entry(file, entries[matched.entry], matched)
        self._attach_libraries(file, interest.libraries, answer)
        if not file.links and not file.per_process:
            for state, number in zip(file.states, file.entries, strict=True):
                self._refuse_state(state, number)
            return False
        for state in file.states:
            self._refused.pop((state.binary, state.mode), None)
        self._make_digest(file)
        return True

    def _attach_entry(self, file: _File, entry: Entry, matched: Matched) -> None:
        asked = entry.asked
        state = BinaryState(
            binary=file.name, mode=asked.mode, functions=0, build_id=file.build_id, image=asked.image,
            skipped=dict(sorted(matched.skipped.items())),
        )  # fmt: skip
        library = self._library(file.name)
        reason = ""
        if not matched.count:
            reason = "none of its functions match"
        elif not matched.functions:
            reason = f"{matched.count:,} functions match, and {self._rows.left:,} of {FUNCTIONS_MAX:,} are left"
        elif library is None:
            reason = f"more than {LIBRARIES_MAX} names of files are in use"
        if not reason and library is not None:
            rows = self._rows.take(matched.functions, library, file.build_id, with_stack=asked.stack)
            done: Attached = self._prober.attach(file.descriptor, file.name, asked.mode, matched.functions, rows)
            file.links += done.links
            file.rows += done.rows
            reason = done.reason if not done.functions else ""
            if done.refused and done.functions:
                state = msgspec.structs.replace(state, skipped={**state.skipped, "refused": done.refused})
            state = msgspec.structs.replace(
                state,
                functions=len(done.functions),
                table_sha256=table_sha256(done.functions) if done.functions else "",
            )
        file.states.append(msgspec.structs.replace(state, reason=reason))
        file.entries.append(entry.number)

    def _attach_libraries(self, file: _File, libraries: tuple[Library, ...], answer: Answer) -> None:
        """Attach built-in probes: both sides of each function."""
        per_process: list[tuple[Library, dict[str, int]]] = []
        for library in libraries:
            offsets = {name: answer.named[name] for *_, name in library.functions if name in answer.named}
            # The node's own libc has its probes already, and a program that is not static calls a libc elsewhere.
            if not offsets or (library.library == "libc" and (not answer.static if file.is_program else file.own)):
                continue
            if answer.go or not answer.native:
                reason = (
                    "it is a Go program: return probes would crash it" if answer.go else "it is not of this machine"
                )
                self._refuse_state(BinaryState(file.name, library.probe, 0, answer.build_id, reason=reason))
                continue
            if self._library(file.name) is None:
                reason = f"more than {LIBRARIES_MAX} names of files are in use"
                self._refuse_state(BinaryState(file.name, library.probe, 0, answer.build_id, reason=reason))
                continue
            if self.scoped and file.own and not file.is_program:
                per_process.append((library, offsets))
            else:
                links = self._attach_both_sides(file, library, offsets, -1)
                file.links += links
                if not links:
                    continue
            functions = [Function(at, name.encode(), len(name)) for name, at in offsets.items()]
            file.states.append(
                BinaryState(
                    file.name,
                    library.probe,
                    len(functions),
                    answer.build_id,
                    table_sha256=table_sha256(sorted(functions, key=lambda f: f.offset)),
                )
            )
        file.per_process = tuple(per_process)

    def _attach_process(self, file: _File, pid: int) -> bool:
        """Give a process its own probes of the node's libraries; return whether it had none."""
        if not file.per_process:
            return False
        started = _started(pid)
        known = self._per_process.get(pid)
        if known is not None and known[1] != started:
            self._drop_process(pid)
            known = None
        if known is None:
            known = self._per_process[pid] = ({}, started)
        if file.id in known[0]:
            return False
        links: list[Link] = []
        for library, offsets in file.per_process:
            links += self._attach_both_sides(file, library, offsets, pid)
        known[0][file.id] = links
        return bool(links)

    def _attach_both_sides(self, file: _File, library: Library, offsets: dict[str, int], pid: int) -> list[Link]:
        links: list[Link] = []
        programs = self._object.programs
        cookie = self._library(file.name) or 0
        path = f"/proc/self/fd/{file.descriptor}"
        state = self._states[library.probe]
        for entry, returning, name in library.functions:
            if name not in offsets:
                continue
            what = f"{file.name}:{name}"
            try:
                # The return side first: an entry whose return is not watched yet would be remembered for nothing.
                for program, back in ((returning, True), (entry, False)):
                    links.append(
                        programs[program].attach_uprobe_at(
                            path, offsets[name], what, pid=pid, returning=back, cookie=cookie
                        )
                    )
            except StellaError as e:
                if not state.attached and (pid < 0 or _started(pid)):
                    self._tell_refused(state, e)
                break
        if links:
            state.attached, state.reason, state.fix = True, "", ""
            state.scope = "process" if pid > 0 or self.scoped else "node"
        return links

    def _make_digest(self, file: _File) -> None:
        """Say which bytes are probed.  When they have changed meanwhile, the next look begins anew."""
        with os.fdopen(os.dup(file.descriptor), "rb") as opened:
            opened.seek(0)
            file.sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if file_id(os.fstat(file.descriptor)) != file.id:
            file.sha256 = ""
        file.states = [msgspec.structs.replace(state, sha256=file.sha256) for state in file.states]

    # ---- change

    def _renew(self, file: _File) -> bool:
        """A watched file was written over, so its offsets mean nothing any more: attach anew."""
        changed = file_id(os.fstat(file.descriptor))
        if changed.size == file.id.size and not self._content_changed(file):
            self._files.pop(file.id)
            _remember(self._alias, file.id, changed)
            file.id = changed
            self._files[changed] = file
            return False
        log.warning("%s was changed on disk: attaching anew", file.name)
        descriptor = os.dup(file.descriptor)
        self._drop(file)
        self._consider(descriptor, file.paths, own=file.own, is_program=file.is_program)
        return True

    def _content_changed(self, file: _File) -> bool:
        # A link or a mode changes the time as well; the probes need not go for that.
        with os.fdopen(os.dup(file.descriptor), "rb") as opened:
            opened.seek(0)
            return not file.sha256 or hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256

    def _let_go(self, pids: set[int]) -> None:
        now = time.monotonic()
        for pid in [pid for pid in self._per_process if pid not in pids and not os.path.exists(f"/proc/{pid}")]:
            self._drop_process(pid)
        for file in list(self._files.values()):
            nameless = not os.fstat(file.descriptor).st_nlink
            if (nameless or not file.own) and now - file.used_at > _UNUSED_SECONDS:
                self._drop(file)

    def _drop(self, file: _File) -> None:
        self._files.pop(file.id, None)
        for link in reversed(file.links):
            link.close()
        for pid in list(self._per_process):
            for link in reversed(self._per_process[pid][0].pop(file.id, [])):
                link.close()
        if self.notices is not None and file.notice:
            self.notices.forget(file.notice)
        self._alias = {version: other for version, other in self._alias.items() if other != file.id}
        os.close(file.descriptor)
        # A row is used again only when no counter speaks of what it was.
        if not file.rows or self.flush() == 0:
            self._rows.give_back(file.rows)
        else:
            log.warning("%d rows of %s stay in use: the ring has no room for its counters", len(file.rows), file.name)

    def _drop_process(self, pid: int) -> None:
        links, _ = self._per_process.pop(pid)
        for link in (link for group in links.values() for link in reversed(group)):
            link.close()

    # ---- words

    def _library(self, name: str) -> int | None:
        if name not in self.libraries:
            if len(self.libraries) >= LIBRARIES_MAX:
                return None
            self.libraries.append(name)
        return self.libraries.index(name)

    def _refuse(self, name: str, interest: Interest, reason: str) -> None:
        for entry in interest.entries:
            asked = entry.asked
            self._refuse_state(
                BinaryState(name[:LIBRARY_NAME_MAX], asked.mode, 0, image=asked.image, reason=reason), entry.number
            )

    def _refuse_state(self, state: BinaryState, entry: int = -1) -> None:
        key = state.binary, state.mode
        if key not in self._refused and len(self._refused) < REFUSED_MAX:
            log.warning("%s is not watched (%s): %s", state.binary, state.mode, state.reason)
            self._refused[key] = state, entry

    def _refuse_libraries(self, libraries: tuple[Library, ...], reason: str) -> None:
        for library in libraries:
            state = self._states[library.probe]
            if not state.attached and library.library == "libssl":
                self._tell_refused(state, StellaError(reason))

    def _missing(self) -> list[BinaryState]:
        """Return the entries for which no file was found at all."""
        met = {number for file in self._files.values() for number in file.entries}
        met |= {number for _, number in self._refused.values()}
        return [
            BinaryState(
                e.asked.binary[:LIBRARY_NAME_MAX],
                e.asked.mode,
                0,
                image=e.asked.image,
                reason="no such file is run yet",
            )
            for e in self._chooser.entries
            if e.number not in met
        ]

    def _say_what_is_missing(self) -> None:
        for library in self._chooser.libraries:
            state = self._states[library.probe]
            if library.library != "libssl":
                continue
            state.scope = "process" if self.scoped else "node"
            if not state.attached and not state.reason:
                state.reason = "no target process uses a TLS library yet" if self.scoped else "no libssl on this node"
                state.fix = "" if self.scoped else "name the library in probes.openssl_libraries"


def _remember(memory: dict[FileId, _Value], version: FileId, value: _Value) -> None:
    if len(memory) >= _DULL_MAX:
        memory.clear()
    memory[version] = value


def _started(pid: int) -> str:
    """Return when a process was started, in its own words; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
