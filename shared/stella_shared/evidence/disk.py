"""The file system, as evidence needs it: every durable step is one method, so that tests can kill any of them.

A new file appears whole or not at all: write `NAME.tmp`, fsync it, rename it, fsync the directory.  An
appended file is durable up to the last `sync`.  Nothing here catches `OSError`: who writes decides.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

TMP_SUFFIX = ".tmp"
# fcntl.h, linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Disk:
    """The real thing.  Tests derive from it to fail or to die at the n-th step."""

    def create(self, path: Path, mode: int) -> int:
        """Open `path` for appending, made empty if it is new; return the descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def write(self, fd: int, data: bytes) -> None:
        """Append all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Make the data of `fd`, and the size needed to read it, survive a power cut."""
        os.fdatasync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(fd, size)

    def rename(self, old: Path, new: Path) -> None:
        """Put `old` in the place of `new`, atomically."""
        os.rename(old, new)

    def exchange(self, one: Path, other: Path) -> None:
        """Let two names of one file system change places, atomically.

        Raises `OSError` with EINVAL or ENOSYS where file system or kernel cannot (renameat2(2)).
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(other))

    def remove(self, path: Path) -> None:
        """Remove `path`; one that is not there is fine."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Make the names in `path` survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def put(self, path: Path, data: bytes, mode: int = 0o640) -> None:
        """Make `path` hold exactly `data`, durably and atomically."""
        tmp = path.with_name(path.name + TMP_SUFFIX)
        self.remove(tmp)
        fd = self.create(tmp, mode)
        try:
            self.write(fd, data)
            self.sync(fd)
        finally:
            os.close(fd)
        self.rename(tmp, path)
        self.sync_directory(path.parent)
