"""The kernel's word that a process has begun to run a file: at an exec, and at each mapping of code.

A file that was told of is not told again (`stella_seen` in bpf/functions.bpf.h), unless `tell_each` asks for it; so
this is quiet on a machine that runs what it has run before, and waking us for it costs nobody much.
"""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import c_void_p
from typing import Final

import msgspec

from stella_collector.libbpf import RING_CALLBACK, Libbpf
from stella_collector.objects import Maps
from stella_shared.errors import BrokenPromise

#: struct stella_notice: ts_ns, file, tgid, kind, path_at, flags; then the path, which ends at WALK_MAX of WALK_ROOM.
NOTICE: Final = struct.Struct("<Q24sIIHB5x")
WALK_MAX, WALK_ROOM = 512, 768
FILE: Final = struct.Struct("<QQII")
EXEC: Final = 1
_SEEN_EACH: Final = b"\2"
_DEVICE_MINOR_BITS: Final = 20


class Notice(msgspec.Struct, frozen=True):
    """A process has begun to run a file.  `file` is the kernel's key of it, for `tell_each` and `forget`.

    `path` is what the kernel calls the file, from the root of the process's mount namespace; "" when it is cut.
    """

    ts_ns: int
    pid: int
    is_exec: bool
    file: bytes
    path: str = ""

    @property
    def version(self) -> tuple[int, int]:
        """Inode number and time of the last change."""
        inode, changed_ns, _, _ = FILE.unpack(self.file)
        return inode, changed_ns


class Notices:
    """The ring of notices.  One owner."""

    def __init__(self, lib: Libbpf, obj: Maps) -> None:
        self._lib = lib
        self._object = obj
        self._taken: list[Notice] = []
        self._callback = RING_CALLBACK(self._on_notice)
        self.fd = obj.map_fd("stella_notices")
        self._ring = lib.ring_buffer__new(self.fd, ctypes.cast(self._callback, c_void_p), None, None)
        if not self._ring:
            raise BrokenPromise("libbpf cannot open the ring of notices")
        self._missed = 0

    def _on_notice(self, _: int, data: int, size: int) -> int:
        if size >= NOTICE.size + WALK_ROOM:
            raw = ctypes.string_at(data, NOTICE.size + WALK_ROOM)
            ts, file, tgid, kind, at, flags = NOTICE.unpack_from(raw)
            path = "" if flags else os.fsdecode(raw[NOTICE.size + at : NOTICE.size + WALK_MAX])
            self._taken.append(Notice(ts, tgid, kind == EXEC, file, path))
        return 0

    def take(self) -> list[Notice]:
        """Return what has come since the last time."""
        self._lib.ring_buffer__consume(self._ring)
        taken, self._taken = self._taken, []
        return taken

    def missed(self) -> bool:
        """Return whether there was no room for some since the last time: then only a look at everybody knows."""
        total = int.from_bytes(self._object.lookup("stella_unnoticed", bytes(4), 8) or b"", "little")
        missed, self._missed = total != self._missed, total
        return missed

    def tell_each(self, file: bytes) -> None:
        """Have every process told that begins to run this file."""
        self._object.update("stella_seen", file, _SEEN_EACH)

    def forget(self, file: bytes) -> None:
        """Have the next process told that begins to run this file."""
        self._object.delete("stella_seen", file)

    def close(self) -> None:
        """Let go of the ring's memory."""
        if self._ring:
            self._lib.ring_buffer__free(self._ring)
            self._ring = None


def device(kernel: int) -> int:
    """Return the kernel's own dev_t as stat(2) writes it."""
    return os.makedev(kernel >> _DEVICE_MINOR_BITS, kernel & ((1 << _DEVICE_MINOR_BITS) - 1))
