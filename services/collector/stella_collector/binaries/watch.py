"""All probes at functions of files: found by inode, attached once for each, and let go when a file is gone.

    exec, dlopen ──notice──> look at that process ─┐
    every few seconds ────> look at everybody ─────┼─> a file not seen before ─> child reads it ─> attach ─> digest
    the node's own files ──> at the start ─────────┘

A watched function is probed in its file, for every process that maps it, and the programs filter: so a process that
begins later is seen from its first call.  TLS and libc probes are attached the same way to a container's own copies
and to programs that have the library linked in.  The node's own libssl, which is everybody's, is with targets
attached to the targets' processes alone (docs/decisions/0005-tls-scope.md).

A file may be wanted in containers of one image only: it then waits, known as dull or with other probes, until a
process of such a container has it, and what is attached for that image goes when none has had it for a minute.

What is attached is an open descriptor, so no path can lead elsewhere in between; the file's (device, inode) and time
of change are compared again once its digest is made, and at each later look.  One lock; methods may block.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from stella_collector import targets
from stella_collector.binaries import mapped
from stella_collector.binaries.attaching import RealInode
from stella_collector.binaries.choosing import Chooser, Entry, Library
from stella_collector.binaries.file_probes import LIBRARY_NAME_MAX, BinaryState, FileProbes, WatchedFile
from stella_collector.binaries.mapped import FileId, Mapping, file_id
from stella_collector.binaries.notices import Notice, Notices
from stella_collector.libbpf import Libbpf
from stella_collector.objects import Link, Maps
from stella_shared.config import Signals
from stella_shared.errors import StellaError

if TYPE_CHECKING:
    from stella_collector.probes import ProbeState

log = logging.getLogger(__name__)
_Value = TypeVar("_Value")

#: Files that are watched at one time.
FILES_MAX: Final = 256
_DULL_MAX: Final = 65_536
#: Files of one glob that are attached before any process maps them.
_ON_DISK_MAX: Final = 64
#: What tells of new files and of processes that have ended, and the tracepoint where it does not name its own.
_TELLERS: Final = (("stella_note_exec", ""), ("stella_note_map", "sys_exit_mmap"), ("stella_fn_exit", ""))
#: A container's file, or one without a name, is let go when nobody has mapped it for so long.
_UNUSED_SECONDS: Final = 60.0


class Binaries:
    """The watched files.  `libraries` are the names that records refer to by index; it only grows."""

    def __init__(
        self,
        signals: Signals,
        lib: Libbpf,
        obj: Maps,
        *,
        wanted: list[Library],
        states: list[ProbeState],
        refused: Callable[[ProbeState, StellaError], None],
        scoped: bool,
        loaded: Iterable[str],
        own_libraries: Callable[[], list[str]],
        known_libraries: Iterable[str] = (),
    ) -> None:
        names = set(loaded)
        self._signals = signals
        self._object = obj
        self._states = {state.name: state for state in states}
        self._own_libraries = own_libraries
        self.scoped = scoped
        self._chooser = Chooser(signals, wanted)
        self.active = bool(wanted or signals.probes.functions)
        self._lock = threading.RLock()
        self._flush_lock = threading.Lock()
        self._can_flush = "stella_fn_flush" in names
        self._real = RealInode(obj)
        self._real.works = "stella_real_inode" in names
        self.notices = Notices(lib, obj) if "stella_note_exec" in names else None
        self._probes = FileProbes(
            obj, states, refused, loaded=names, with_functions=bool(signals.probes.functions), scoped=scoped,
            libraries=known_libraries,
        )  # fmt: skip
        self._links: list[Link] = []
        self._files: dict[FileId, WatchedFile] = {}
        self._alias: dict[FileId, FileId] = {}
        #: Files that nothing is wanted of, but in containers of these images.
        self._dull: dict[FileId, frozenset[str]] = {}
        self._ids: set[int] = set()
        #: Processes of the targets that were there at the last look.
        self._met: set[int] = set()
        self._said: list[BinaryState] = []
        #: Microseconds from the kernel's notice to attached, the last few.
        self.delays_us: list[int] = []
        if self.active:
            self._probes.reader.start()  # it is warm when it is needed

    # ---- what there is

    @property
    def libraries(self) -> list[str]:
        """Names that records refer to by index.  It only grows."""
        return self._probes.libraries

    def tell_library(self, heed: Callable[[], None]) -> None:
        """Have `heed` called for each new name, before the first record can refer to it.  By any thread."""
        self._probes.on_library = heed

    def states(self) -> list[BinaryState]:
        """Return every watched file, and those that are not although they were asked for.  Never waits."""
        return self._said

    def _say(self) -> bool:
        """Make what `states` returns; return whether it has changed."""
        for library in self._chooser.libraries:
            state = self._states[library.probe]
            if library.library != "libssl":
                continue
            state.scope = "process" if self.scoped else "node"
            if not state.attached and not state.reason:
                state.reason = "no target process uses a TLS library yet" if self.scoped else "no libssl on this node"
                state.fix = "" if self.scoped else "name the library in probes.openssl_libraries"
        found = [state for file in self._files.values() for state in file.states]
        refused = [state for state, _ in self._probes.refused.values()]
        before, self._said = self._said, sorted([*found, *refused, *self._missing()], key=msgspec.json.encode)
        return before != self._said

    def _missing(self) -> list[BinaryState]:
        """Return the entries for which no file was found at all."""
        met = {number for file in self._files.values() for number in file.entries}
        met |= {number for _, number in self._probes.refused.values()}
        return [
            BinaryState(
                e.asked.binary[:LIBRARY_NAME_MAX],
                e.asked.mode,
                0,
                image=e.asked.image,
                reason=self._why_missing(e),
            )
            for e in self._chooser.entries
            if e.number not in met
        ]

    def _why_missing(self, entry: Entry) -> str:
        if entry.asked.image and not self._chooser.images[entry.asked.image]:
            return "no container of that image is known"
        if entry.number in self._probes.matchless:
            return "no file of that name has such a function"
        return "no container of that image runs such a file yet" if entry.asked.image else "no such file is run yet"

    # ---- attaching the programs that tell us, and letting go

    def begin(self, ids: Iterable[int]) -> None:
        """Attach what brings notices, then look at all there is.  `ids` are the targets' cgroup ids."""
        self._ids = set(ids)
        if not self.active:
            return
        with self._lock:
            for file in list(self._files.values()):  # of a time before we were detached
                self._drop(file)
            self._dull.clear()
        self._probes.reader.start()
        for name, where in _TELLERS:
            if self.notices is None or (name == "stella_fn_exit" and not self._probes.rows.count):
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
            self.scoped = self._probes.scoped = False
            self._look_on_disk(with_globs=True)
            self._say()

    def detach(self) -> None:
        """Detach everything.  Counters keep what they have until they are flushed."""
        self._probes.reader.abandon()
        with self._lock:
            for link in self._links:
                link.close()
            self._links.clear()
            for pid in self._probes.processes():
                self._probes.drop_process(pid)
            for file in self._files.values():
                self._probes.detach(file)

    def close(self) -> None:
        """Detach, end the reader, close every file."""
        self.detach()
        with self._lock:
            self._probes.reader.close()
            if self.notices is not None:
                self.notices.close()
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    def flush(self) -> int:
        """Turn counters into records; return how many found no room in the ring and wait."""
        if not self._can_flush or not self._probes.rows.count:
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
            return self._say() or changed

    def recheck(self) -> bool:
        """Look at what may change without a notice and soon matters; return whether anything changed.

        That is: watched files that are written over, files that are replaced under a name that was asked for, and
        processes that were forked with a library mapped which each process has its own probes of.
        """
        with self._lock:
            changed = False
            for file in list(self._files.values()):
                if file_id(os.fstat(file.descriptor)) != file.id:
                    changed |= self._renew(file)
            changed |= self._look_on_disk(with_globs=False)
            if any(file.per_process for file in self._files.values()):
                pids = set(targets.processes(self._ids))
                for pid in sorted(pids - self._met):
                    changed |= self._look(pid, {}, [])
                self._met = pids
            return self._say() or changed

    def scan(self, ids: Iterable[int] | None = None) -> bool:
        """Look at every process in scope and at the node's own files; return whether anything changed."""
        if not self.active:
            return False
        with self._lock:
            if ids is not None:
                self._ids = set(ids)
            changed = self.recheck()
            changed |= self._look_on_disk(with_globs=True)
            pids = self._in_scope()
            known: dict[tuple[int, int], FileId | None] = {}
            for pid in pids:
                changed |= self._look(pid, known, [])
            self._let_go(set(pids))
            return self._say() or changed

    def select(self, images: dict[str, frozenset[str]]) -> bool:
        """Take up which containers are of the images that entries ask for; return whether anything changed."""
        if images == self._chooser.images:
            return False
        with self._lock:
            new = self._chooser.select(images)
            changed = False
            for pid in self._in_scope() if new else ():
                if mapped.container(pid) in new:
                    changed |= self._look(pid, {}, [])
            return self._say() or changed

    def _in_scope(self) -> list[int]:
        return targets.processes(self._ids) if self.scoped else mapped.everybody()

    def _look(self, pid: int, known: dict[tuple[int, int], FileId | None], notices: list[Notice]) -> bool:
        """Look at what a process has mapped.  `known` spares looking at a file twice in one round."""
        changed = False
        told = {notice.version[0]: notice for notice in notices}
        program = mapped.program(pid)
        globs = self._chooser.globs_of(mapped.container(pid)) if self._chooser.images else frozenset()
        for mapping in mapped.mappings(pid):
            place = mapping.device, mapping.inode
            if place not in known:
                known[place] = mapped.version(mapping)
            version = known[place]
            if version is None:
                continue
            notice = told.pop(mapping.inode, None)
            if globs & self._dull.get(version, frozenset()):
                del self._dull[version]
            if version not in self._dull:
                changed |= self._look_at(mapping, version, globs, program)
            file = self._files.get(self._alias.get(version, version))
            if file is None:
                if notice is not None and version not in self._dull:
                    told[mapping.inode] = notice  # it has ended while we looked
                elif notice is not None and self._dull[version] and self.notices is not None:
                    self.notices.forget(notice.file)  # the next one may be in a container of such an image
                continue
            file.used_at = time.monotonic()
            file.globs.update(dict.fromkeys(file.globs.keys() & globs, file.used_at))
            if notice is not None:
                self._keep_notice(file, notice)
            changed |= self._probes.attach_process(file, pid)
        for notice in told.values():  # the process has ended before we looked
            changed |= self._meet_by_path(notice)
        return changed

    def _look_at(self, mapping: Mapping, version: FileId, globs: frozenset[str], program: tuple[int, int]) -> bool:
        """Look at a file that a process has, if it is new, or if more is wanted of it there; say whether it changed."""
        changed = False
        if self._alias.get(version, version) not in self._files:
            changed = self._meet(mapping, globs, is_program=(version.device, version.inode) == program)
        file = self._files.get(self._alias.get(version, version))
        if file is not None and globs & file.waits_for:
            changed |= self._attach_anew(file, file.globs.keys() | globs)
            # An alias ends with what was attached, and the file may go by another version here.
            if self._alias.get(version, version) not in self._files:
                self._meet(mapping, globs, is_program=file.is_program)
        return changed

    def _keep_notice(self, file: WatchedFile, notice: Notice) -> None:
        file.notice = notice.file
        if (file.per_process or file.waits_for) and self.notices is not None:
            self.notices.tell_each(notice.file)

    def _meet_by_path(self, notice: Notice) -> bool:
        """Look at one of the node's own files by the kernel's path, when it still is the file that was run.

        For any other one the next process is to be told of.
        """
        try:
            descriptor = mapped.open_regular(notice.path)
        except OSError:
            descriptor = -1
        version = file_id(os.fstat(descriptor)) if descriptor >= 0 else None
        if version is None or (version.inode, version.changed_ns) != notice.version:
            if descriptor >= 0:
                os.close(descriptor)
            if self.notices is not None:
                self.notices.forget(notice.file)
            return False
        changed = False
        if version in self._dull or self._alias.get(version, version) in self._files:
            os.close(descriptor)
        else:
            changed = self._consider(descriptor, (notice.path,), own=True, is_program=notice.is_exec)
        file = self._files.get(self._alias.get(version, version))
        if file is not None:
            file.used_at = time.monotonic()
            self._keep_notice(file, notice)
        return changed

    def _meet(self, mapping: Mapping, globs: frozenset[str], *, is_program: bool) -> bool:
        """Look at a file for the first time; return whether anything changed."""
        try:
            descriptor = mapped.open_mapped(mapping)
        except OSError:
            return False
        status = os.fstat(descriptor)
        own = mapped.is_own(mapping, status)
        paths = tuple(dict.fromkeys(mapped.path_for_process(mapping)))
        return self._consider(descriptor, paths, own=own, is_program=is_program, globs=globs)

    def _look_on_disk(self, *, with_globs: bool) -> bool:
        """Attach to the node's own files before anybody runs them, where the node's own processes are watched."""
        filters = self._signals.filters
        eager = not self.scoped or bool(filters.target_cgroups or filters.target_namespaces)
        paths = self._own_libraries() if with_globs and not self.scoped else []
        if eager:
            paths += [
                path
                for entry in self._chooser.entries
                if entry.glob and not entry.asked.image and (with_globs or not set(entry.glob) & set("*?"))
                for path in mapped.on_disk(entry.glob, _ON_DISK_MAX)
            ]
        changed = False
        for path in dict.fromkeys(paths):
            try:
                status = os.stat(path)
                version = file_id(status)
                if version in self._dull or version in self._files or version in self._alias:
                    continue
                descriptor = mapped.open_regular(path)
            except OSError:
                continue
            is_program = bool(status.st_mode & 0o111) and ".so" not in os.path.basename(path)
            changed |= self._consider(descriptor, (path, os.path.realpath(path)), own=True, is_program=is_program)
        return changed

    # ---- one file

    def _consider(
        self,
        descriptor: int,
        paths: tuple[str, ...],
        *,
        own: bool,
        is_program: bool,
        globs: Collection[str] = frozenset(),
    ) -> bool:
        """Take over an open file: watch it, or close it and remember that it is dull.

        `globs` are the images of the container it was found in.
        """
        version = file_id(os.fstat(descriptor))
        interest = self._chooser.interest(paths, own=own, is_program=is_program, globs=globs)
        build_id = ""
        file: WatchedFile | None = None
        try:
            if not interest:
                return False
            real = self._real.of(descriptor)
            for other in self._files.values():
                if other.real == real and other.id.changed_ns == version.changed_ns:
                    _remember(self._alias, version, other.id)
                    return False
            if len(self._files) >= FILES_MAX:
                self._probes.refuse(paths[0], interest, f"more than {FILES_MAX} files are watched already")
                return True
            file = WatchedFile(
                paths[0][:LIBRARY_NAME_MAX], descriptor, version, real, own, paths, is_program,
                used_at=time.monotonic(),
            )  # fmt: skip
            attached = self._probes.attach(file, interest)
            build_id = file.build_id
            if not attached:
                file = None
                return bool(interest.entries)
            file.globs = dict.fromkeys(interest.globs_of(file.entries), file.used_at)
            file.waits_for = interest.waits_for(build_id)
            self._files[version] = file
            return True
        finally:
            if file is None:
                os.close(descriptor)
                if version not in self._alias:
                    _remember(self._dull, version, interest.waits_for(build_id))

    # ---- change

    def _renew(self, file: WatchedFile) -> bool:
        """A watched file was written over, so its offsets mean nothing any more: attach anew."""
        changed = file_id(os.fstat(file.descriptor))
        if changed.size == file.id.size and not self._content_changed(file):
            self._files.pop(file.id)
            _remember(self._alias, file.id, changed)
            file.id = changed
            self._files[changed] = file
            return False
        log.warning("%s was changed on disk: attaching anew", file.name)
        return self._attach_anew(file, file.globs.keys())

    def _attach_anew(self, file: WatchedFile, globs: Collection[str]) -> bool:
        descriptor = os.dup(file.descriptor)
        self._drop(file)
        self._consider(descriptor, file.paths, own=file.own, is_program=file.is_program, globs=globs)
        return True

    def _content_changed(self, file: WatchedFile) -> bool:
        # A link or a mode changes the time as well; the probes need not go for that.
        with os.fdopen(os.dup(file.descriptor), "rb") as opened:
            opened.seek(0)
            return not file.sha256 or hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256

    def _let_go(self, pids: set[int]) -> None:
        now = time.monotonic()
        for pid in self._probes.processes():
            if pid not in pids and not os.path.exists(f"/proc/{pid}"):
                self._probes.drop_process(pid)
        for file in list(self._files.values()):
            nameless = not os.fstat(file.descriptor).st_nlink
            unused = {glob for glob, at in file.globs.items() if now - at > _UNUSED_SECONDS}
            if (nameless or not file.own) and now - file.used_at > _UNUSED_SECONDS:
                self._drop(file)
            elif unused:
                self._attach_anew(file, file.globs.keys() - unused)

    def _drop(self, file: WatchedFile) -> None:
        self._files.pop(file.id, None)
        if self.notices is not None and file.notice:
            self.notices.forget(file.notice)
        self._alias = {version: other for version, other in self._alias.items() if other != file.id}
        self._probes.drop(file, self.flush)


def _remember(memory: dict[FileId, _Value], version: FileId, value: _Value) -> None:
    if len(memory) >= _DULL_MAX:
        memory.clear()
    memory[version] = value


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
