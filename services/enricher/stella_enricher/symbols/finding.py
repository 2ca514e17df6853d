"""Finds the file of a build-id: through a process's mappings, in debug directories.  The only module that opens them.

Paths come from other processes and may lead anywhere by the time they are used.  So a path is resolved below the
process's own root and never above it (openat2, RESOLVE_IN_ROOT), without opening what it leads to; only a regular
file is then opened, and only its build-id, read from that open file, says that it is the one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from stella_shared import elf_notes

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_MAPS_BYTES_MAX: Final = 8 << 20
#: Files of one process that are looked at.
_FILES_MAX: Final = 1024
#: Build-ids that are remembered by file.
_KNOWN_MAX: Final = 16_384
_SCAN_FILES_MAX: Final = 10_000


class Finder:
    """Opens files by build-id.  `debug_directories` are laid out like /usr/lib/debug; in those of `scan` every file
    is looked at, whatever its name."""

    def __init__(self, debug_directories: Sequence[Path], *, scan: Sequence[Path] = ()) -> None:
        self._directories = list(debug_directories)
        self._known: dict[tuple[int, int, int, int], str] = {}
        self._scan = list(scan)
        self._scanned: dict[str, list[Path]] | None = None

    @contextlib.contextmanager
    def of_process(self, pid: int, build_id: str) -> Iterator[int]:
        """Give a descriptor of the file that process `pid` has mapped under this build-id; -1 when there is none."""
        descriptor = -1
        try:
            # The kernel writes paths as they are for us; beyond our mounts, as in a container, as they are for it.
            for opened in [o for p in _mapped(pid) for o in (partial(_open_in, pid, p), partial(_open_here, Path(p)))]:
                descriptor = self._open_if(build_id, opened)
                if descriptor >= 0:
                    break
            yield descriptor
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @contextlib.contextmanager
    def of_path(self, path: Path, build_id: str = "") -> Iterator[tuple[int, str]]:
        """Give (descriptor, build-id) of a file; (-1, what it has instead) when it is not the one asked for."""
        try:
            descriptor = _open_here(path)
        except OSError:
            descriptor = -1
        found = self._build_id(descriptor) if descriptor >= 0 else ""
        try:
            yield (descriptor if found and build_id in ("", found) else -1), found
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @contextlib.contextmanager
    def program(self, build_id: str) -> Iterator[int]:
        """Give a descriptor of the program or library itself, out of the debug directories; -1 when it is not there."""
        descriptor = -1
        try:
            for path in self._scan_for(build_id):
                descriptor = self._open_if(build_id, partial(_open_here, path))
                if descriptor >= 0 and elf_notes.holds_code(_reader(descriptor)):
                    break
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor = -1
            yield descriptor
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @contextlib.contextmanager
    def debug_file(self, build_id: str, link: str = "", beside: str = "") -> Iterator[tuple[int, bool]]:
        """Give (descriptor, whether its CRC must fit) of the separate debug file; (-1, False) when there is none.

        `link` is the name in the program's .gnu_debuglink, `beside` the folder of the program.
        """
        descriptor, by_link = -1, False
        try:
            for path in [*self._by_build_id(build_id), *self._scan_for(build_id)]:
                descriptor = self._open_if(build_id, partial(_open_here, path))
                if descriptor >= 0:
                    break
            if descriptor < 0 and link and "/" not in link:
                for path in self._by_link(link, beside):
                    with contextlib.suppress(OSError):
                        descriptor, by_link = _open_here(path), True
                        break
            yield descriptor, by_link
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _by_build_id(self, build_id: str) -> list[Path]:
        tail = Path(build_id[:2]) / f"{build_id[2:]}.debug"
        return [d / below / tail for d in self._directories for below in (".build-id", ".")]

    def _by_link(self, link: str, beside: str) -> list[Path]:
        out = [Path(beside) / link, Path(beside) / ".debug" / link] if beside else []
        if beside:
            out += [directory / beside.lstrip("/") / link for directory in self._directories]
        return [*out, *(directory / link for directory in self._scan)]

    def _scan_for(self, build_id: str) -> list[Path]:
        if not self._scan:
            return []
        if self._scanned is None:
            self._scanned = {}
            for path in _files_below(self._scan):
                with self.of_path(path) as (descriptor, found):
                    if descriptor >= 0:
                        self._scanned.setdefault(found, []).append(path)
        return self._scanned.get(build_id, [])

    def _open_if(self, build_id: str, opened: Callable[[], int]) -> int:
        try:
            descriptor = opened()
        except OSError:
            return -1
        if self._build_id(descriptor) == build_id:
            return descriptor
        os.close(descriptor)
        return -1

    def _build_id(self, descriptor: int) -> str:
        """Return the build-id of an open file, from memory while the file has not changed."""
        s = os.fstat(descriptor)
        key = (s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            try:
                found = elf_notes.build_id(_reader(descriptor))
            except OSError:
                return ""
            self._known[key] = found
        return found


def _mapped(pid: int) -> list[str]:
    """Return the files that a process can execute code of, each inode once."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            data = file.read(_MAPS_BYTES_MAX)
    except OSError:
        return []
    found: dict[tuple[bytes, bytes], str] = {}
    for line in data.splitlines():
        fields = line.split(b" ", 5)
        if len(fields) == 6 and b"x" in fields[1] and fields[4] != b"0" and len(found) < _FILES_MAX:
            path = fields[5].strip().removesuffix(b" (deleted)")
            if path.startswith(b"/"):
                found.setdefault((fields[3], fields[4]), os.fsdecode(path.replace(b"\\012", b"\n")))
    return list(found.values())


def _open_in(pid: int, path: str) -> int:
    """Return a descriptor of a regular file as process `pid` sees it.  Raises `OSError`."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        found = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), how, len(how))
        if found < 0:
            raise OSError(ctypes.get_errno(), "openat2")
    finally:
        os.close(root)
    return _open_regular(found)


def _open_here(path: Path) -> int:
    return _open_regular(os.open(path, os.O_PATH | os.O_CLOEXEC))


def _open_regular(place: int) -> int:
    """Return a readable descriptor of the regular file that an O_PATH descriptor, which is closed, stands for."""
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(0, "not a regular file")
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(place)


def _reader(descriptor: int) -> Callable[[int, int], bytes]:
    return lambda offset, size: os.pread(descriptor, size, offset)


def _files_below(directories: Sequence[Path]) -> Iterator[Path]:
    count = 0
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in sorted(names):
                count += 1
                if count > _SCAN_FILES_MAX:
                    return
                yield Path(folder) / name
