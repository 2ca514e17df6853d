"""Probes at offsets of one open file, and the rows that tell the kernel which function each of them is."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from stella_collector.binaries.notices import device
from stella_collector.binaries.question import BUILD_ID_BYTES, SYMBOL_BYTES, Function
from stella_collector.objects import Link, Maps
from stella_shared.errors import StellaError

#: Functions watched at one time, in all files.
FUNCTIONS_MAX: Final = 20_000
#: The same where each probe is a link of its own: attaching and detaching these takes the kernel long.
SINGLE_MAX: Final = 256
#: Links that are tried while looking for the functions that a file's link fails on.
_ATTEMPTS_MAX: Final = 128
#: struct stella_function: offset library symbol_len build_id_len flags build_id symbol_total symbol.
ROW: Final = struct.Struct(f"<QIHBB20sI{SYMBOL_BYTES}s")
_WITH_STACK: Final = 1

Mode = Literal["trace", "count"]
#: The programs of each mode: for many probes by one link, and for one.
PROGRAMS: Final[dict[Mode, tuple[str, str]]] = {
    "trace": ("stella_fn_trace", "stella_fn_trace1"),
    "count": ("stella_fn_count", "stella_fn_count1"),
}


class Attached(msgspec.Struct):
    """What was attached: links, the rows they use, and the functions that the kernel refused."""

    links: list[Link]
    rows: list[int]
    functions: list[Function]
    refused: int = 0
    reason: str = ""


class Rows:
    """The rows of `stella_functions`, given out and taken back."""

    def __init__(self, obj: Maps, count: int) -> None:
        self._object = obj
        self._free = list(range(count - 1, -1, -1))
        self.count = count

    @property
    def left(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, functions: Sequence[Function], library: int, build_id: str, *, with_stack: bool) -> list[int]:
        """Describe functions; return their rows, which are their probes' cookies."""
        raw = bytes.fromhex(build_id)
        raw = raw if len(raw) <= BUILD_ID_BYTES else b""
        taken = [self._free.pop() for _ in functions]
        values = [
            ROW.pack(f.offset, library, len(f.symbol), len(raw), _WITH_STACK * with_stack, raw, f.total, f.symbol)
            for f in functions
        ]
        self._object.update_many("stella_functions", [struct.pack("<I", row) for row in taken], values)
        return taken

    def give_back(self, rows: Sequence[int]) -> None:
        """Let rows be used anew, once nothing refers to them: links closed, counters flushed."""
        self._free += rows


class Prober:
    """Attaches functions' probes."""

    def __init__(self, obj: Maps, *, many: bool) -> None:
        self._programs = obj.programs
        self.many = many

    def attach(self, file: int, what: str, mode: Mode, functions: Sequence[Function], rows: Sequence[int]) -> Attached:
        """Attach at functions of an open file, those that the kernel takes.  Never raises for what it refuses."""
        done = Attached([], list(rows), [])
        path = f"/proc/self/fd/{file}"
        many, one = PROGRAMS[mode]
        attempts = 0
        if not self.many and len(functions) > SINGLE_MAX:
            done.refused = len(functions)
            done.reason = f"this kernel attaches one by one, and these are more than {SINGLE_MAX}"
            return done
        step = len(functions) if self.many else 1
        pieces = [(at, min(at + step, len(functions))) for at in range(0, len(functions), max(1, step))]
        # One function that cannot be probed fails the whole link: halve until it is alone.
        while pieces:
            begin, end = pieces.pop()
            attempts += 1
            offsets = [f.offset for f in functions[begin:end]]
            try:
                if self.many:
                    link = self._programs[many].attach_uprobe_multi(path, offsets, rows[begin:end], what)
                else:
                    link = self._programs[one].attach_uprobe_at(
                        path, offsets[0], what, pid=-1, returning=False, cookie=rows[begin]
                    )
            except StellaError as e:
                done.reason = str(e)
                if end - begin > 1 and attempts < _ATTEMPTS_MAX:
                    middle = (begin + end) // 2
                    pieces += [(middle, end), (begin, middle)]
                else:
                    done.refused += end - begin
                continue
            done.links.append(link)
            done.functions += functions[begin:end]
        done.functions.sort(key=lambda f: f.offset)
        return done


class RealInode:
    """Says which inode a mapping of a file is really of: of the layer that holds it, where the file is an overlay's."""

    def __init__(self, obj: Maps) -> None:
        self._object = obj
        self._program = obj.programs.get("stella_real_inode")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.works = True

    def of(self, file: int) -> tuple[int, int]:
        """Return (device, inode), as stat(2) counts devices.  Where the kernel cannot say, it is stat's own answer."""
        status = os.fstat(file)
        at = self._libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)
        if self._program is None or not self.works or at in (None, ctypes.c_void_p(-1).value):
            return status.st_dev, status.st_ino
        try:
            self._program.run(bytearray(struct.pack("<Q", at)))
            said = self._object.lookup("stella_mapped", bytes(4), 16) or bytes(16)
        except StellaError:
            self.works = False
            return status.st_dev, status.st_ino
        finally:
            self._libc.munmap(at, mmap.PAGESIZE)
        inode, dev, found = struct.unpack("<QII", said)
        return (device(dev), inode) if found else (status.st_dev, status.st_ino)
