"""What is inlined where, out of DWARF.  The only module that speaks to `symbolic`; in the child process alone.

`symbolic` turns debug information into its SymCache, a file of sorted ranges.  Its lookup answers for one
address; a table needs every place where the answer changes, so the ranges are read here, for the one version of
the format that we know.  The sizes it names must add up to its length, else nothing is said.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from cffi import FFI
from symbolic.debuginfo import Archive
from symbolic.exceptions import SymbolicError

#: magic, version, debug id, architecture, then how many files, functions, locations, ranges, and bytes of text.
_HEADER: Final = struct.Struct("<4sI32xIIIIII16x")
_VERSION: Final = 9
_FILE_BYTES: Final = 24
_FUNCTION: Final = struct.Struct("<IIII")
_LOCATION: Final = struct.Struct("<IIII")
_NOTHING: Final = 0xFFFFFFFF
#: A chain beyond this is no program's.
DEPTH_MAX: Final = 64
RANGES_MAX: Final = 8_000_000

#: Made at import: it loads modules, and later the child can open none.
_ffi: Final = FFI()
Places = list[tuple[int, tuple[bytes, ...]]]


class NotRead(Exception):
    """The debug information cannot be used."""


def places(file: int) -> Places:
    """Return (address, functions inlined there innermost first) of an open file, where it changes, sorted.

    Addresses count from the lowest loaded one.  Raises `NotRead`.
    """
    try:
        data = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        # What it takes for bytes is their address and length.
        found = next(iter(Archive.from_bytes(_ffi.from_buffer(data)).iter_objects()), None)
        if found is None or "debug" not in found.features:
            return []
        return _decode(bytes(found.make_symcache().open_stream().read()))  # type: ignore[no-untyped-call]
    except (SymbolicError, OSError, struct.error, ValueError, IndexError) as e:
        raise NotRead(str(e)) from None


def _decode(data: bytes) -> Places:
    magic, version, _, files, functions, locations, ranges, text_bytes = _HEADER.unpack_from(data)
    at_functions = _HEADER.size + files * _FILE_BYTES
    at_locations = at_functions + functions * _FUNCTION.size
    at_ranges = at_locations + locations * _LOCATION.size
    at_text = (at_ranges + ranges * 4 + 7) & -8
    if magic != b"SYMC" or version != _VERSION:
        raise NotRead(f"SymCache {version} instead of {_VERSION}")
    if at_text + text_bytes != len(data) or ranges > min(locations, RANGES_MAX):
        raise NotRead("a SymCache of another layout")
    text = data[at_text:]
    names = [
        _string(text, row[0]) if row[0] != _NOTHING else b""
        for row in _FUNCTION.iter_unpack(data[at_functions:at_locations])
    ]
    rows = list(_LOCATION.iter_unpack(data[at_locations:at_ranges]))
    first = locations - ranges
    out: Places = []
    chains: dict[int, tuple[bytes, ...]] = {_NOTHING: ()}

    def chain_of(location: int) -> tuple[bytes, ...]:
        """Return the names from this location outwards."""
        steps: list[int] = []
        while location not in chains and len(steps) < DEPTH_MAX:
            steps.append(location)
            location = rows[location][3]
        chain = chains.get(location, ())
        for step in reversed(steps):
            function = rows[step][2]
            name = names[function] if function != _NOTHING else b""
            chain = chains[step] = (name or b"?", *chain)
        return chain

    last: tuple[bytes, ...] = ()
    for index, begin in enumerate(struct.unpack_from(f"<{ranges}I", data, at_ranges)):
        chain = chain_of(first + index)[:-1] if rows[first + index][3] != _NOTHING else ()
        if chain != last:
            out.append((begin, chain))
            last = chain
    return out


def _string(text: bytes, at: int) -> bytes:
    """Return a string: its length in LEB128, then its bytes."""
    length = shift = 0
    while True:
        byte = text[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return text[at : at + length]
