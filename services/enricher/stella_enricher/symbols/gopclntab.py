"""Functions of a Go program, out of `.gopclntab`, which every Go program keeps, stripped or not.  Pure.

The layouts are those of Go 1.2, 1.16, 1.18 and 1.20 (debug/gosym/pclntab.go); the first word tells them apart.
"""

from __future__ import annotations

import struct
from typing import Final

_MAGICS: Final = {0xFFFFFFFB: 2, 0xFFFFFFFA: 16, 0xFFFFFFF0: 18, 0xFFFFFFF1: 20}
_FUNCTIONS_MAX: Final = 4_000_000
_NAME_MAX: Final = 4096


def functions(data: bytes, order: str, text_address: int) -> list[tuple[int, int, bytes]]:
    """Return (begin, end, name) of every function, [] when the table cannot be read.

    `order` is "<" or ">".  `text_address` counts where the table leaves it open, as in position-independent
    programs and since Go 1.26.
    """
    try:
        return _functions(data, order, text_address)
    except (struct.error, ValueError):
        return []


def _functions(data: bytes, order: str, text_address: int) -> list[tuple[int, int, bytes]]:
    version = _MAGICS.get(struct.unpack_from(order + "I", data)[0], 0)
    pointer = data[7] if len(data) > 7 else 0
    if not version or pointer not in (4, 8) or data[4:6] != b"\0\0":
        return []
    word = order + ("Q" if pointer == 8 else "I")

    def number(index: int) -> int:
        value: int = struct.unpack_from(word, data, 8 + index * pointer)[0]
        return value

    count = number(0)
    if count > _FUNCTIONS_MAX:
        return []
    names = 0
    base = 0
    if version >= 18:
        base, names, table = number(2) or text_address, number(3), number(7)
    elif version == 16:
        names, table = number(2), number(6)
    else:
        table = 8 + pointer
    # Rows of (begin, place of the function's own data), and one more begin: the end of the last function.
    if version >= 18:
        row, entry = struct.Struct(order + "II"), order + "I"
    else:
        row, entry = struct.Struct(order + ("QQ" if pointer == 8 else "II")), word
    rows = list(row.iter_unpack(data[table : table + count * row.size]))
    if len(rows) != count:
        return []
    begins = [begin for begin, _ in rows] + [struct.unpack_from(entry, data, table + count * row.size)[0]]
    skip = struct.calcsize(entry)
    found = []
    for index, (_, place) in enumerate(rows):
        at = place if version == 2 else table + place
        name_at = names + struct.unpack_from(order + "I", data, at + skip)[0]
        name = data[name_at : data.index(b"\0", name_at, name_at + _NAME_MAX)]
        if name and begins[index] < begins[index + 1]:
            found.append((base + begins[index], base + begins[index + 1], name))
    return found
