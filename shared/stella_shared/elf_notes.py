"""The build-id of a file, out of its first bytes and its notes.  Pure, and total: any bytes give an answer.

This is the little that must be known before a file is given to a parser, of every file that a process has
mapped; the kernel's own reader (lib/buildid.c) looks at the same fields.  Everything else is read by
libraries, in a process of its own (`child`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_HEADERS_MAX: Final = 256
_NOTE_BYTES_MAX: Final = 64 << 10
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_PF_X: Final = 1
_SHT_NOTE: Final = 7
_OFFSET_MAX: Final = 1 << 62
_NT_GNU_BUILD_ID: Final = 3
_BUILD_ID_BYTES: Final = range(1, 33)


Read = Callable[[int, int], bytes]


def build_id(read: Read) -> str:
    """Return the build-id in hex, "" when there is none.  `read(offset, size)` may return less than asked for."""
    order, rows = _segments(read)
    for kind, _, offset, length, align in rows:
        if kind == _PT_NOTE and offset < _OFFSET_MAX:
            found = _in_notes(read(offset, min(length, _NOTE_BYTES_MAX)), order, 8 if align == 8 else 4)
            if found:
                return found
    # Go's own linker writes the note where no segment of notes covers it (and the kernel does not see it).
    for kind, offset, length, align in _sections(read):
        if kind == _SHT_NOTE and offset < _OFFSET_MAX:
            found = _in_notes(read(offset, min(length, _NOTE_BYTES_MAX)), order, 8 if align == 8 else 4)
            if found:
                return found
    return ""


def holds_code(read: Read) -> bool:
    """Return whether the file holds its own code, which a separate debug file does not."""
    return any(kind == _PT_LOAD and flags & _PF_X and length for kind, flags, _, length, _ in _segments(read)[1])


def _segments(read: Read) -> tuple[str, list[tuple[int, int, int, int, int]]]:
    """Return the byte order, and (type, flags, offset, bytes in the file, alignment) of each segment."""
    order, wide, rows = _headers(read, wide=(32, 54, "IIQQQQQQ"), narrow=(28, 42, "8I"))
    if wide:
        return order, [(kind, flags, at, size, align) for kind, flags, at, _, _, size, _, align in rows]
    return order, [(kind, flags, at, size, align) for kind, at, _, _, size, _, flags, align in rows]


def _sections(read: Read) -> list[tuple[int, int, int, int]]:
    """Return (type, offset, size, alignment) of each section."""
    rows = _headers(read, wide=(40, 58, "IIQQQQIIQQ"), narrow=(32, 46, "10I"))[2]
    return [(kind, at, size, align) for _, kind, _, _, at, size, _, _, align, _ in rows]


def _headers(
    read: Read, *, wide: tuple[int, int, str], narrow: tuple[int, int, str]
) -> tuple[str, bool, list[tuple[int, ...]]]:
    """Return the byte order, whether the file is one of 64 bits, and the rows of a table that its head names.

    `wide` and `narrow`: where the head has the table's place, where size and count of its rows, and the row.
    """
    head = read(0, 64)
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return "<", False, []
    is_wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    at_place, at_counts, fields = wide if is_wide else narrow
    at: int = struct.unpack_from(order + ("Q" if is_wide else "I"), head, at_place)[0]
    size, count = struct.unpack_from(order + "HH", head, at_counts)
    row = struct.Struct(order + fields)
    if size != row.size or at > _OFFSET_MAX:
        return order, is_wide, []
    data = read(at, size * min(count, _HEADERS_MAX))
    return order, is_wide, list(row.iter_unpack(data[: len(data) // size * size]))


def _in_notes(data: bytes, order: str, align: int) -> str:
    at = 0
    while at + 12 <= len(data):
        names, bytes_, kind = struct.unpack_from(order + "III", data, at)
        begin = at + 12 + _up(names, align)
        if kind == _NT_GNU_BUILD_ID and data[at + 12 : at + 12 + names] == b"GNU\0" and bytes_ in _BUILD_ID_BYTES:
            found = data[begin : begin + bytes_]
            return found.hex() if len(found) == bytes_ else ""
        at = begin + _up(bytes_, align)
    return ""


def _up(size: int, align: int) -> int:
    return (size + align - 1) & -align
