"""A disk that dies or fails at the n-th step, and forgets what was not made durable, as a power cut does."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

from stella_shared.evidence.disk import Disk


class Killed(BaseException):
    """The process is gone.  Nothing of ours catches this."""


class FaultyDisk(Disk):
    """Counts durable steps.  At step `at`: `kill` dies, otherwise one `OSError`; before or after doing the step.

    With `then_kill_after`, it dies that many steps after the error.
    """

    def __init__(
        self, at: int = -1, *, kill: bool = True, after: bool = False, seed: int = 0, then_kill_after: int = 0
    ) -> None:
        self.steps = 0
        self._at, self._kill, self._after = at, kill, after
        self._then_kill_after = then_kill_after
        self._random = random.Random(seed)
        self._paths: dict[int, Path] = {}
        self._durable: dict[Path, int] = {}
        self._renames: list[tuple[Path, Path, bytes | None]] = []
        self._removed: list[tuple[Path, bytes]] = []

    def _step(self, do: object) -> None:
        mine = self.steps == self._at
        self.steps += 1
        if mine and not self._after:
            self._fail()
        do()  # type: ignore[operator]
        if mine and self._after:
            self._fail()

    def _fail(self) -> None:
        if self._kill:
            raise Killed
        if self._then_kill_after:
            self._kill, self._at = True, self.steps + self._then_kill_after
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def power_cut(self) -> None:
        """Lose any part of what was not synced: tails of files, and renames and removals in unsynced directories."""
        for path, gone in self._removed:
            if not path.exists() and self._random.random() < 0.5:
                path.write_bytes(gone)
        for old, new, content in reversed(self._renames):
            if new.is_dir() and self._random.random() < 0.5:
                os.rename(new, old)
            elif new.is_file() and self._random.random() < 0.5:
                old.write_bytes(new.read_bytes())
                self._durable[old] = self._durable.pop(new, 0)
                new.unlink() if content is None else new.write_bytes(content)
        for path, durable in self._durable.items():
            if path.exists() and path.stat().st_size > durable:
                keep = self._random.randint(durable, path.stat().st_size)
                with path.open("r+b") as file:
                    file.truncate(keep)
                    if keep > durable and self._random.random() < 0.5:
                        # Blocks that were allocated and never written read as something else.
                        file.seek(self._random.randint(durable, keep - 1))
                        file.write(b"\0")

    def create(self, path: Path, mode: int) -> int:
        opened: list[int] = []
        self._step(lambda: opened.append(Disk.create(self, path, mode)))
        self._paths[opened[0]] = path
        self._durable.setdefault(path, path.stat().st_size)
        return opened[0]

    def write(self, fd: int, data: bytes) -> None:
        if self.steps == self._at and self._after:
            # Half of it is written when the disk is full, or the power goes.
            Disk.write(self, fd, data[: len(data) // 2])
        self._step(lambda: Disk.write(self, fd, data))

    def sync(self, fd: int) -> None:
        def do() -> None:
            # What a real fsync would do to the disk is not looked at here, and it is slow.
            self._durable[self._paths[fd]] = os.fstat(fd).st_size

        self._step(do)

    def truncate(self, fd: int, size: int) -> None:
        def do() -> None:
            Disk.truncate(self, fd, size)
            path = self._paths[fd]
            self._durable[path] = min(self._durable[path], size)

        self._step(do)

    def rename(self, old: Path, new: Path) -> None:
        def do() -> None:
            content = new.read_bytes() if new.is_file() else None
            Disk.rename(self, old, new)
            self._renames.append((old, new, content))
            self._durable[new] = self._durable.pop(old, new.stat().st_size)

        self._step(do)

    def exchange(self, one: Path, other: Path) -> None:
        self._step(lambda: Disk.exchange(self, one, other))

    def remove(self, path: Path) -> None:
        def do() -> None:
            if path.exists():
                self._removed.append((path, path.read_bytes()))
            Disk.remove(self, path)
            self._durable.pop(path, None)

        self._step(do)

    def sync_directory(self, path: Path) -> None:
        def do() -> None:
            self._renames = [r for r in self._renames if r[1].parent != path]
            self._removed = [r for r in self._removed if r[0].parent != path]

        self._step(do)
