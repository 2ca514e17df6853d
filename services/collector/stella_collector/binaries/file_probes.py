"""Probes of one file: what is asked of it, what is attached, and what could not be and why.

    file + interest ──> reader ──> rows ──> links ──> digest

Watched functions are attached for every process that maps the file.  Built-in probes of the node's own libraries are,
with targets, attached process by process; everywhere else like watched functions.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from stella_collector.binaries.attaching import FUNCTIONS_MAX, Attached, Prober, Rows
from stella_collector.binaries.choosing import Entry, Interest, Library
from stella_collector.binaries.mapped import FileId, file_id, started
from stella_collector.binaries.question import Answer, Function, Matched, Patterns, Question, table_sha256
from stella_collector.binaries.reader import Reader
from stella_collector.objects import Link, Maps
from stella_shared.errors import StellaError

if TYPE_CHECKING:
    from stella_collector.probes import ProbeState

log = logging.getLogger(__name__)

#: Every batch names the libraries, and a traced process may map files of any name: bounded in number and length.
LIBRARIES_MAX: Final = 64
LIBRARY_NAME_MAX: Final = 256
#: Files that are told of although they are not watched.
REFUSED_MAX: Final = 64


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


class WatchedFile(msgspec.Struct):
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
    #: Images of entries, and when a process of a container of each was seen to have the file.
    globs: dict[str, float] = {}
    #: Images for which more is attached once a container of them has the file.
    waits_for: frozenset[str] = frozenset()
    #: Offsets that each process gets probes of its own for.
    per_process: tuple[tuple[Library, dict[str, int]], ...] = ()
    notice: bytes = b""
    used_at: float = 0.0


class FileProbes:
    """Attaches to files and lets go of them.  `libraries` are the names that records refer to; it only grows."""

    def __init__(
        self,
        obj: Maps,
        states: list[ProbeState],
        refused: Callable[[ProbeState, StellaError], None],
        *,
        loaded: Iterable[str],
        with_functions: bool,
        scoped: bool,
        libraries: Iterable[str] = (),
    ) -> None:
        names = set(loaded)
        self._object = obj
        self._states = {state.name: state for state in states}
        self._tell_refused = refused
        self.scoped = scoped
        self.libraries: list[str] = list(libraries)
        #: Called before the first record can refer to a name that is new.
        self.on_library: Callable[[], None] = lambda: None
        self.rows = Rows(obj, FUNCTIONS_MAX if with_functions and "stella_fn_trace1" in names else 0)
        self._prober = Prober(
            obj, many="stella_fn_trace" in names and obj.programs["stella_fn_trace"].takes_uprobe_multi()
        )
        self.reader = Reader()
        self.refused: dict[tuple[str, str, str], tuple[BinaryState, int]] = {}
        #: Entries whose glob names files that have no such function.
        self.matchless: set[int] = set()
        self._of_process: dict[int, tuple[dict[FileId, list[Link]], str]] = {}

    def attach(self, file: WatchedFile, interest: Interest) -> bool:
        """Attach to a file what is wanted of it; return whether there was anything."""
        names = sorted({function for library in interest.libraries for *_, function in library.functions})
        question = Question(
            [Patterns(e.number, list(e.asked.functions)) for e in interest.entries], names, self.rows.left
        )
        answer = self.reader.ask(file.descriptor, question)
        entries = {e.number: e for e in interest.entries if e.build_id in ("", answer.build_id)}
        if answer.reason:
            by_path = Interest(tuple(e for e in interest.entries if not e.build_id), ())
            self.refuse(file.name, by_path, answer.reason)
            if not file.is_program:
                self._refuse_libraries(interest.libraries, f"{file.name}: {answer.reason}")
            return False
        file.build_id = answer.build_id
        for matched in answer.matched:
            if matched.entry in entries:
                self._attach_entry(file, entries[matched.entry], matched)
        self._attach_libraries(file, interest.libraries, answer)
        if not file.links and not file.per_process:
            for state, number in zip(file.states, file.entries, strict=False):
                self._refuse_state(state, number)
            self.rows.give_back(file.rows)
            return False
        for state in file.states:
            self.refused.pop((state.binary, state.mode, state.image), None)
        self._make_digest(file)
        return True

    def _attach_entry(self, file: WatchedFile, entry: Entry, matched: Matched) -> None:
        asked = entry.asked
        state = BinaryState(
            binary=file.name, mode=asked.mode, functions=0, build_id=file.build_id, image=asked.image,
            skipped=dict(sorted(matched.skipped.items())),
        )  # fmt: skip
        if not matched.count and set(asked.binary) & set("*?"):
            self.matchless.add(entry.number)
            return
        library = self._library(file.name)
        reason = ""
        if not matched.count:
            reason = "none of its functions match"
        elif not matched.functions:
            reason = f"{matched.count:,} functions match, and {self.rows.left:,} of {FUNCTIONS_MAX:,} are left"
        elif library is None:
            reason = f"more than {LIBRARIES_MAX} names of files are in use"
        if not reason and library is not None:
            rows = self.rows.take(matched.functions, library, file.build_id, with_stack=asked.stack)
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
        # Entries stand before built-in probes, so both lists begin alike.
        file.states.append(msgspec.structs.replace(state, reason=reason))
        file.entries.append(entry.number)

    def _attach_libraries(self, file: WatchedFile, libraries: tuple[Library, ...], answer: Answer) -> None:
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

    def attach_process(self, file: WatchedFile, pid: int) -> bool:
        """Give a process its own probes of the node's libraries; return whether it had none."""
        if not file.per_process:
            return False
        began = started(pid)
        known = self._of_process.get(pid)
        if known is not None and known[1] != began:
            self.drop_process(pid)
            known = None
        if known is None:
            known = self._of_process[pid] = ({}, began)
        if file.id in known[0]:
            return False
        links: list[Link] = []
        for library, offsets in file.per_process:
            links += self._attach_both_sides(file, library, offsets, pid)
        known[0][file.id] = links
        return bool(links)

    def _attach_both_sides(self, file: WatchedFile, library: Library, offsets: dict[str, int], pid: int) -> list[Link]:
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
                if not state.attached and (pid < 0 or started(pid)):
                    self._tell_refused(state, e)
                break
        if links:
            state.attached, state.reason, state.fix = True, "", ""
            state.scope = "process" if pid > 0 or self.scoped else "node"
        return links

    def drop(self, file: WatchedFile, flush: Callable[[], int]) -> None:
        """Detach from a file and close it.  Its rows are used again only when no counter speaks of what they were."""
        self.detach(file)
        for links, _ in self._of_process.values():
            _close(links.pop(file.id, []))
        os.close(file.descriptor)
        if not file.rows or flush() == 0:
            self.rows.give_back(file.rows)
        else:
            log.warning("%d rows of %s stay in use: the ring has no room for its counters", len(file.rows), file.name)

    def detach(self, file: WatchedFile) -> None:
        """Detach from a file."""
        _close(file.links)
        file.links = []

    def drop_process(self, pid: int) -> None:
        """Detach what a process has of its own."""
        for links in self._of_process.pop(pid)[0].values():
            _close(links)

    def processes(self) -> list[int]:
        """Return the processes that have probes of their own."""
        return list(self._of_process)

    def _make_digest(self, file: WatchedFile) -> None:
        """Say which bytes are probed.  When they have changed meanwhile, the next look begins anew."""
        with os.fdopen(os.dup(file.descriptor), "rb") as opened:
            opened.seek(0)
            file.sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if file_id(os.fstat(file.descriptor)) != file.id:
            file.sha256 = ""
        file.states = [msgspec.structs.replace(state, sha256=file.sha256) for state in file.states]

    def _library(self, name: str) -> int | None:
        if name not in self.libraries:
            if len(self.libraries) >= LIBRARIES_MAX:
                return None
            self.libraries.append(name)
            self.on_library()
        return self.libraries.index(name)

    def refuse(self, name: str, interest: Interest, reason: str) -> None:
        for entry in interest.entries:
            asked = entry.asked
            self._refuse_state(
                BinaryState(name[:LIBRARY_NAME_MAX], asked.mode, 0, image=asked.image, reason=reason), entry.number
            )

    def _refuse_state(self, state: BinaryState, entry: int = -1) -> None:
        key = state.binary, state.mode, state.image
        if key not in self.refused and len(self.refused) < REFUSED_MAX:
            log.warning("%s is not watched (%s): %s", state.binary, state.mode, state.reason)
            self.refused[key] = state, entry

    def _refuse_libraries(self, libraries: tuple[Library, ...], reason: str) -> None:
        for library in libraries:
            state = self._states[library.probe]
            if not state.attached and library.library == "libssl":
                self._tell_refused(state, StellaError(reason))


def _close(links: list[Link]) -> None:
    # Entry sides go before return sides.
    for link in reversed(links):
        link.close()
