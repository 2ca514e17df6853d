"""The way to `lines.c`, which vouches for lines that are beyond doubt without Python's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Array, byref, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

NATIVE: Final = Path(__file__).parent / "native" / "lines.so"
#: The `lane` of a line that is for Python to judge.
UNSURE: Final = 2**32 - 1
NONE_TWICE: Final = 2**64 - 1


class Lane(ctypes.Structure):
    """struct lane of lines.c: a lane of the ledger, and what has been seen of its numbers."""

    number: int
    first: int
    next: int
    bits_at: int
    bits: int
    count: int
    twice: int
    ordered: int
    _fields_ = (
        ("number", c_int64),
        ("first", c_uint64),
        ("next", c_uint64),
        ("bits_at", c_uint64),
        ("bits", c_uint64),
        ("count", c_uint64),
        ("twice", c_uint64),
        ("ordered", c_uint64),
    )


class Place(ctypes.Structure):
    """struct place of lines.c: where a line belongs, or, with `lane` UNSURE, where in the block it begins."""

    seq: int
    lane: int
    line: int
    _fields_ = (("seq", c_uint64), ("lane", c_uint32), ("line", c_uint32))


class _Run(ctypes.Structure):
    _fields_ = (
        ("name", c_void_p),
        ("boot", c_void_p),
        ("name_length", c_uint32),
        ("boot_length", c_uint32),
        ("lanes_at", c_uint32),
        ("lanes", c_uint32),
    )


class _Table(ctypes.Structure):
    _fields_ = (
        ("node", c_void_p),
        ("runs", POINTER(_Run)),
        ("lanes", POINTER(Lane)),
        ("node_length", c_uint32),
        ("run_count", c_uint32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the functions of `lines.c`, or None where they were not built."""
    try:
        lib = ctypes.CDLL(str(NATIVE))
    except OSError:
        return None
    lib.stella_lines_check.restype = c_uint64
    lib.stella_lines_check.argtypes = (POINTER(_Table), c_void_p, c_uint64, c_uint32, c_void_p, POINTER(c_uint64))
    lib.stella_lines_mark.restype = c_uint64
    lib.stella_lines_mark.argtypes = (c_void_p, c_void_p, c_void_p, c_uint64)
    return lib


def text(value: str) -> bytes:
    """Return a string as it stands in a canonical line, without its quotes."""
    return msgspec.json.encode(value)[1:-1]


class RunRow(msgspec.Struct, frozen=True):
    """A run of the table: its `lanes` begin at index `lanes_at`, ascending by number."""

    name: str
    boot_id: str
    lanes_at: int
    lanes: int


class Table:
    """What lines are held against.  `runs` ascend by `text(name)`."""

    def __init__(self, lib: ctypes.CDLL, node: str, runs: Sequence[RunRow], lanes: Array[Lane]) -> None:
        self._check = lib.stella_lines_check
        # The C structs point into these.
        self._held: list[object] = [lanes]
        rows = (_Run * len(runs))()
        for row, run in zip(rows, runs, strict=True):
            row.name, row.name_length = self._hold(run.name)
            row.boot, row.boot_length = self._hold(run.boot_id)
            row.lanes_at, row.lanes = run.lanes_at, run.lanes
        address, length = self._hold(node)
        self._table = _Table(address, rows, lanes, length, len(runs))

    def _hold(self, value: str) -> tuple[int, int]:
        data = text(value)
        room = (c_uint8 * len(data)).from_buffer_copy(data)
        self._held.append(room)
        return ctypes.addressof(room), len(data)

    def place(self, address: int, length: int, places: Array[Place]) -> tuple[int, int]:
        """Fill `places` for the lines at `address`, which end with a newline.

        Returns (how many lines, how many bytes they are): all, or as many as there is room for.
        """
        consumed = c_uint64()
        lines = self._check(byref(self._table), address, length, len(places), places, byref(consumed))
        return int(lines), consumed.value
