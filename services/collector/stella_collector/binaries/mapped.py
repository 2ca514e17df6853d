"""Which files processes have mapped to execute, and opening exactly those: the only module that looks.

A path in a mapping may lead to another file by the time it is used.  Where the kernel allows it (CAP_SYS_ADMIN or
CAP_CHECKPOINT_RESTORE) a file is opened through /proc/PID/map_files, which is the mapped file and no other; else
through the process's own root, and then it is the file that the path has now.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_MAPS_BYTES_MAX: Final = 8 << 20
_FILES_MAX: Final = 1024
#: What a look at all processes takes on at once.
PROCESSES_MAX: Final = 32_768


#: A container's cgroup, as the runtimes name it; below these parents bare digits are no container's.
_CONTAINER: Final = re.compile(
    rb"(?:[^:]*:)?(?:(?:docker|cri-containerd|nerdctl|crio|libpod|libpod-payload)[-:])?([0-9a-f]{64})(?:\.scope)?"
)
_NOT_PARENTS: Final = (b"libpod_parent", b"buildkit")
_CGROUP_BYTES_MAX: Final = 1 << 16


class Mapping(msgspec.Struct, frozen=True):
    """A file that a process can execute code of, under the path that the process has it by."""

    pid: int
    device: int
    inode: int
    addresses: str
    path: str


class FileId(msgspec.Struct, frozen=True):
    """One version of one file, by what stat(2) says of it."""

    device: int
    inode: int
    changed_ns: int
    size: int


def file_id(status: os.stat_result) -> FileId:
    """Return the version of the file."""
    return FileId(status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)


def mappings(pid: int) -> list[Mapping]:
    """Return the files that a process has mapped to execute, each inode once; [] when it is gone or not ours to see."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            data = file.read(_MAPS_BYTES_MAX)
    except OSError:
        return []
    found: dict[tuple[bytes, bytes], Mapping] = {}
    for line in data.splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and b"x" in fields[1] and fields[4] != b"0" and fields[5].startswith(b"/"):
            key = fields[3], fields[4]
            if key not in found and len(found) < _FILES_MAX:
                major, _, minor = fields[3].partition(b":")
                path = os.fsdecode(fields[5].replace(b"\\012", b"\n")).removesuffix(" (deleted)")
                found[key] = Mapping(
                    pid, os.makedev(int(major, 16), int(minor, 16)), int(fields[4]), fields[0].decode(), path
                )
    return list(found.values())


def program(pid: int) -> tuple[int, int]:
    """Return (device, inode) of the program that a process runs, (0, 0) when it has none."""
    try:
        status = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def container(pid: int) -> str:
    """Return the id of the container that a process is in, 64 hex, "" when in none.

    The outermost counts: a process can make cgroups of any name below its own, and none above.  As in records, the
    cgroup v1 hierarchy of the pids controller counts where v2 names no container.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            lines = [line.split(b":", 2) for line in file.read(_CGROUP_BYTES_MAX).splitlines()]
    except OSError:
        return ""
    paths = [line[2] for line in lines if len(line) == 3 and not line[1]]
    paths += [line[2] for line in lines if len(line) == 3 and b"pids" in line[1].split(b",")]
    for path in paths:
        parts = [b"", *path.split(b"/")]
        for above, part in itertools.pairwise(parts):
            match = _CONTAINER.fullmatch(part)
            if match and above not in _NOT_PARENTS:
                return match[1].decode()
    return ""


def open_mapped(mapping: Mapping) -> int:
    """Return a descriptor of the mapped file.  Raises `OSError` when it cannot be had."""
    try:
        return open_regular(f"/proc/{mapping.pid}/map_files/{_plain(mapping.addresses)}")
    except PermissionError:
        return _open_below_root(mapping)


def _open_below_root(mapping: Mapping) -> int:
    """Open the path as the process would; no link in it leads out of the process's root (openat2, RESOLVE_IN_ROOT)."""
    root = os.open(f"/proc/{mapping.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        place = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(mapping.path), how, len(how))
        if place < 0:
            raise OSError(ctypes.get_errno(), "openat2")
    finally:
        os.close(root)
    return _readable(place)


def version(mapping: Mapping) -> FileId | None:
    """Return which version of which file is mapped, None when that cannot be known."""
    try:
        return file_id(os.stat(f"/proc/{mapping.pid}/map_files/{_plain(mapping.addresses)}"))
    except PermissionError:
        with contextlib.suppress(OSError):
            return file_id(os.stat(f"/proc/{mapping.pid}/root{mapping.path}"))
    except OSError:
        pass
    return None


def open_regular(path: str) -> int:
    """Return a readable descriptor of a regular file.  Raises `OSError` for anything else, which is not opened."""
    return _readable(os.open(path, os.O_PATH | os.O_CLOEXEC))


def _readable(place: int) -> int:
    """Return a readable descriptor of the regular file that an O_PATH descriptor, which is closed, stands for."""
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(0, "not a regular file")
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(place)


def _plain(addresses: str) -> str:
    # The folder's names have no leading zeros.
    begin, _, end = addresses.partition("-")
    return f"{int(begin, 16):x}-{int(end, 16):x}"


def is_own(mapping: Mapping, status: os.stat_result) -> bool:
    """Return whether the path leads to the same file for us: the node's own, not one of a container's."""
    try:
        here = os.stat(mapping.path)
    except (OSError, ValueError):
        return False
    return (here.st_dev, here.st_ino) == (status.st_dev, status.st_ino)


def everybody() -> list[int]:
    """Return the pids of all processes that have a program."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids[:PROCESSES_MAX] if pid != os.getpid() and os.path.exists(f"/proc/{pid}/exe")]


def path_for_process(mapping: Mapping) -> Iterator[str]:
    """Yield the paths the file goes by: as the kernel writes it for us, and as it is below the process's root."""
    yield mapping.path
    with contextlib.suppress(OSError):
        root = os.readlink(f"/proc/{mapping.pid}/root")
        if root != "/" and mapping.path.startswith(root + "/"):
            yield mapping.path[len(root) :]


def on_disk(pattern: str, most: int) -> list[str]:
    """Return the regular files of this node that a glob names, at most `most`, without looking below `**`."""
    if "**" in pattern:
        return []
    if not set(pattern) & set("*?["):
        return [pattern] if Path(pattern).is_file() else []
    folder, *rest = Path(pattern).parts
    found = [Path(folder)]
    for part in rest:
        if set(part) & set("*?"):
            found = [hit for path in found for hit in sorted(_children(path, part))][: 4 * most]
        else:
            found = [path / part for path in found if (path / part).exists()]
    return [str(path) for path in found if path.is_file()][:most]


def _children(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern.replace("[", "[[]")))
    except OSError:
        return []


def started(pid: int) -> str:
    """Return when a process was started, in its own words; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
