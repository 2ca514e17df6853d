"""The table of one file: which function covers an address, and what is inlined there.  Pure.

It is made once for each build-id and outlives the file.  Its bytes, all integers little-endian:

    8 bytes   "STSYM" 0 0 and the format's version
    32 bytes  SHA-256 of everything that follows
    u64       length of the body once decompressed
    zlib      the body:
        u32 × 6     lengths: head in bytes; ranges; segments; places; chains in u32s; names in bytes
        head        JSON: `Head`, keys sorted
        segments    u64 offset, u64 size, u64 address          parts of the file that are loaded for execution
        ranges      u64 begin (all), u64 end (all), u64 the symbol's begin (all), u32 name, u32 source (all)
        places      u64 begin (all), u32 chain (all)           where what is inlined changes; 0: nothing is
        chains      u32 count, u32 name × count                innermost first; the first one is empty
        names       UTF-8, each ended by a zero; a name is its begin

Ranges are sorted and never overlap.  The same parts give the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

import msgspec

VERSION: Final = 1
MAGIC: Final = b"STSYM\0\0" + bytes([VERSION])
#: A body beyond this is no table of ours.
BODY_BYTES_MAX: Final = 512 << 20
_COUNTS: Final = struct.Struct("<6I")
_LENGTH: Final = struct.Struct("<Q")
_FRONT: Final = len(MAGIC) + 32 + _LENGTH.size


class Head(msgspec.Struct, frozen=True):
    """What the table is about.  `link`: name and CRC of the separate debug file that the file asks for."""

    build_id: str
    symbolizer: str
    sources: list[str]
    libc: str = ""
    #: Why it holds no names, "" when it does.
    reason: str = ""
    #: Why nothing is known about inlined functions, "" when it is.
    inlined_reason: str = ""
    link: tuple[str, int] | None = None


class Range(msgspec.Struct, frozen=True, gc=False):
    """Addresses begin ≤ a < end belong to the symbol that begins at `symbol_begin`; `source` indexes the head's."""

    begin: int
    end: int
    symbol_begin: int
    name: str
    source: int


class Broken(ValueError):
    """These bytes are no table, or not of this version, or were changed."""


class Table:
    """A table in memory."""

    __slots__ = (
        "_begins",
        "_chains",
        "_ends",
        "_names",
        "_place_chains",
        "_places",
        "_range_names",
        "_sources",
        "_symbol_begins",
        "bytes",
        "head",
        "segments",
    )  # fmt: skip

    def __init__(self, data: bytes) -> None:
        """Read a table.  Raises `Broken`."""
        if data[: len(MAGIC)] != MAGIC:
            raise Broken("no table of this version")
        if hashlib.sha256(data[len(MAGIC) + 32 :]).digest() != data[len(MAGIC) : len(MAGIC) + 32]:
            raise Broken("its digest does not fit")
        (length,) = _LENGTH.unpack_from(data, len(MAGIC) + 32)
        if length > BODY_BYTES_MAX:
            raise Broken("it is larger than tables are")
        try:
            body = zlib.decompressobj().decompress(data[_FRONT:], length)
            self._take_apart(memoryview(body), length)
        except (zlib.error, struct.error, msgspec.MsgspecError, ValueError) as e:
            raise Broken(f"it cannot be read: {e}") from None

    def _take_apart(self, body: memoryview, length: int) -> None:
        if len(body) != length:
            raise ValueError("it is cut")
        head, ranges, segments, places, chains, names = _COUNTS.unpack_from(body)
        at = _COUNTS.size

        def take(count: int, code: str) -> array[int]:
            nonlocal at
            out = array(code)
            size = count * out.itemsize
            if at + size > length:
                raise ValueError("it is cut")
            out.frombytes(body[at : at + size])
            if sys.byteorder == "big":
                out.byteswap()
            at += size
            return out

        self.head = msgspec.json.decode(bytes(body[at : at + head]), type=Head)
        at += head
        numbers = take(segments * 3, "Q")
        self.segments = [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)]
        self._begins, self._ends, self._symbol_begins = (take(ranges, "Q") for _ in range(3))
        self._range_names, self._sources = take(ranges, "I"), take(ranges, "I")
        self._places, self._place_chains = take(places, "Q"), take(places, "I")
        self._chains = take(chains, "I")
        self._names = bytes(body[at : at + names])
        if at + names != length:
            raise ValueError("it has another length than it says")
        self.bytes = length

    def address(self, offset: int) -> int | None:
        """Return the address at which an offset of the file is loaded, None when it is not loaded to be executed."""
        for begin, size, address in self.segments:
            if begin <= offset < begin + size:
                return offset - begin + address
        return None

    def find(self, address: int) -> Range | None:
        """Return what covers an address."""
        at = bisect_right(self._begins, address) - 1
        if at < 0 or address >= self._ends[at]:
            return None
        name = self._name(self._range_names[at])
        return Range(self._begins[at], self._ends[at], self._symbol_begins[at], name, self._sources[at])

    def inlined(self, address: int) -> list[str]:
        """Return the functions that are inlined at an address, innermost first."""
        at = bisect_right(self._places, address) - 1
        if at < 0:
            return []
        chain = self._place_chains[at]
        return [self._name(name) for name in self._chains[chain + 1 : chain + 1 + self._chains[chain]]]

    def __len__(self) -> int:
        return len(self._begins)

    def _name(self, at: int) -> str:
        return self._names[at : self._names.index(b"\0", at)].decode()


def encode(
    head: Head,
    segments: Iterable[tuple[int, int, int]],
    ranges: Iterable[Range],
    places: Iterable[tuple[int, tuple[str, ...]]],
) -> bytes:
    """Return the bytes of a table.  `places`: from this address on, these functions are inlined."""
    names = bytearray()
    known: dict[str, int] = {}

    def name_of(text: str) -> int:
        at = known.get(text)
        if at is None:
            at = known[text] = len(names)
            names.extend(text.replace("\0", "").encode("utf-8", "backslashreplace") + b"\0")
        return at

    numbers = array("Q", [number for segment in segments for number in segment])
    rows = list(ranges)
    begins, ends, symbols = (
        array("Q", [getattr(row, field) for row in rows]) for field in ("begin", "end", "symbol_begin")
    )
    range_names, sources = array("I", [name_of(row.name) for row in rows]), array("I", [row.source for row in rows])
    chains = array("I", [0])
    chain_of: dict[tuple[str, ...], int] = {(): 0}
    place_begins, place_chains = array("Q"), array("I")
    for begin, chain in places:
        if chain not in chain_of:
            chain_of[chain] = len(chains)
            chains.extend([len(chain), *(name_of(name) for name in chain)])
        place_begins.append(begin)
        place_chains.append(chain_of[chain])
    text = msgspec.json.encode(head, order="sorted")
    arrays = [numbers, begins, ends, symbols, range_names, sources, place_begins, place_chains, chains]
    if sys.byteorder == "big":
        for one in arrays:
            one.byteswap()
    counts = (len(text), len(rows), len(numbers) // 3, len(place_begins), len(chains), len(names))
    body = b"".join([_COUNTS.pack(*counts), text, *(one.tobytes() for one in arrays), bytes(names)])
    rest = _LENGTH.pack(len(body)) + zlib.compress(body, 6)
    return MAGIC + hashlib.sha256(rest).digest() + rest
