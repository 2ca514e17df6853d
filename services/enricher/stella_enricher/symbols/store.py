"""Tables on disk, by build-id: made once, there when the binary is gone.  The only module that touches them.

    DIRECTORY/<first two digits>/<build-id>

Several enrichers share a directory.  A file appears whole or not at all (written beside, then renamed); a crash
leaves a `.new` file, which the next sweep removes.  What is changed on disk fails its digest and is removed.
When the files are more than `max_bytes` together, those that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Final

from stella_enricher.symbols.table import Broken, Table

log = logging.getLogger(__name__)

_NEW: Final = ".new"
_LEFT_OVER_SECONDS: Final = 3600.0
#: A use is noted at most this often.
_TOUCH_SECONDS: Final = 3600.0


class Store:
    """The tables below `directory`, which is made when the first one comes."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._bytes: int | None = None
        self.damaged = 0

    def path(self, build_id: str) -> Path:
        """Return where the table of a build-id stands."""
        return self._directory / build_id[:2] / build_id

    def get(self, build_id: str) -> Table | None:
        """Return the table of a build-id, None when there is none that can be used."""
        path = self.path(build_id)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with open(descriptor, "rb") as file:
            try:
                table = Table(file.read(self._max_bytes + 1))
                if table.head.build_id != build_id:
                    raise Broken("it is of another file")
                if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_SECONDS:
                    os.utime(descriptor)
                return table
            except (Broken, OSError) as e:
                self.damaged += 1
                log.warning("symbol table %s cannot be used and is removed: %s", path, e)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, build_id: str, data: bytes) -> bool:
        """Keep a table.  Returns whether it is kept: a full disk costs the table, nothing else."""
        if len(data) > self._max_bytes:
            return False
        path = self.path(build_id)
        beside = path.with_name(f"{build_id}.{secrets.token_hex(4)}{_NEW}")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            # A crash before this line leaves a file that nobody reads, one after it the table.
            beside.rename(path)
        except OSError as e:
            log.warning("symbol table %s cannot be kept: %s", path, e)
            with contextlib.suppress(OSError):
                beside.unlink()
            return False
        if self._bytes is not None:
            self._bytes += len(data)
        if self._bytes is None or self._bytes > self._max_bytes:
            self._sweep(path)
        return True

    def _sweep(self, newest: Path) -> None:
        """Count what is there, and remove the longest unused until it fits."""
        now = time.time()
        rows: list[tuple[float, int, Path]] = []
        for path in self._directory.glob("??/*"):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if path.name.endswith(_NEW):
                    if now - status.st_mtime > _LEFT_OVER_SECONDS:
                        path.unlink()
                elif path != newest:
                    rows.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in rows) + newest.lstat().st_size
        for _, size, path in sorted(rows):
            if total <= self._max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
        self._bytes = total
