"""Symbol tables out of ELF files.  The only module that speaks to pyelftools; in the child process alone.

pyelftools finds sections, segments and notes.  The rows of the symbol tables, of which a library has a hundred
thousand, are unpacked in one go.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import IO, Any, Final, Literal

from elftools.common.exceptions import DWARFError, ELFError, ELFParseError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile

from stella_enricher.symbols import gopclntab
from stella_enricher.symbols.names import demangled
from stella_enricher.symbols.table import Range

#: What parsing hostile bytes may raise; anything but these is a fault of ours, and the parent counts it the same.
REFUSALS: Final = (
    ELFError, ELFParseError, DWARFError, ConstructError, struct.error, ValueError, IndexError, KeyError, TypeError,
    AttributeError, OverflowError, AssertionError, EOFError, OSError, lzma.LZMAError, zlib.error, UnicodeError,
    RecursionError,
)  # fmt: skip
_MINI_BYTES_MAX: Final = 256 << 20
_MINI_MEMORY_MAX: Final = 128 << 20
_SECTION_BYTES_MAX: Final = 1 << 30
_SYMBOLS_MAX: Final = 4_000_000
_NAME_BYTES_MAX: Final = 64 << 10
_SHF_EXECINSTR: Final = 4
_PF_X: Final = 1
_FUNCTIONS: Final = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_NO_TYPE: Final = 0
_BINDING_RANK: Final = {1: 0, 10: 0, 2: 1, 0: 2}  # global, unique, weak, local
_ARM: Final = ("EM_ARM", "EM_AARCH64")

Source = Literal["symtab", "dynsym", "minidebuginfo", "gopclntab"]


class Symbol:
    """A function: where it begins and ends, and how good its name is.  With `open_ended`, the next one ends it too."""

    __slots__ = ("begin", "end", "name", "open_ended", "rank", "source")

    def __init__(
        self,
        begin: int,
        end: int,
        name: bytes,
        binding: int,
        source: int,
        *,
        unsized: bool = False,
        open_ended: bool = False,
    ) -> None:
        self.begin, self.end, self.name, self.source, self.open_ended = begin, end, name, source, open_ended
        # Of several names for one function: one with a size, for users, exported, short, first in the alphabet.
        self.rank = (unsized, len(name) - len(name.lstrip(b"_")) if not _mangled(name) else 0,
                     _BINDING_RANK.get(binding, 3), source, len(name), name)  # fmt: skip


def _mangled(name: bytes) -> bool:
    return name.startswith((b"_Z", b"_R"))


class Elf:
    """One ELF file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._length = file.seek(0, io.SEEK_END)
        self._file = ELFFile(file)
        self.order = "<" if self._file.little_endian else ">"
        self._wide = self._file.elfclass == 64
        self._sections = [(s.name, s) for s in self._file.iter_sections()]

    def segments(self) -> list[tuple[int, int, int]]:
        """Return (offset, size, address) of what is loaded from the file to be executed."""
        rows = [s.header for s in self._file.iter_segments("PT_LOAD")]
        return sorted((h.p_offset, h.p_filesz, h.p_vaddr) for h in rows if h.p_flags & _PF_X and h.p_filesz)

    def base(self) -> int:
        """Return the address of the first loaded segment."""
        for segment in self._file.iter_segments("PT_LOAD"):
            return int(segment.header.p_vaddr)
        return 0

    def link(self) -> tuple[str, int] | None:
        """Return name and CRC out of .gnu_debuglink."""
        data = self._data(".gnu_debuglink", 8192)
        if data is None or b"\0" not in data:
            return None
        name = data[: data.index(b"\0")]
        at = (len(name) + 4) & ~3
        if not name or b"/" in name or at + 4 > len(data):
            return None
        return name.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode(), int(
            struct.unpack_from(self.order + "I", data, at)[0]
        )

    def libc(self) -> str:
        """Return which libc the file is or asks for, "" when it does not say."""
        interpreter = self._data(".interp", 4096) or b""
        dynamic = self._file.get_section_by_name(".dynamic")
        needed: list[str] = []
        if dynamic is not None and hasattr(dynamic, "iter_tags"):
            for count, tag in enumerate(dynamic.iter_tags()):
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag == "DT_SONAME":
                    needed.append(tag.soname)
                if count > 4096:
                    break
        if b"ld-musl" in interpreter or any("musl" in name for name in needed):
            return "musl"
        if b"ld-linux" in interpreter or any(n == "libc.so.6" or n.startswith("ld-linux") for n in needed):
            return "glibc"
        return ""

    def has_debug_information(self) -> bool:
        """Return whether there is DWARF in the file itself."""
        return any(name in (".debug_info", ".zdebug_info") and self._bytes(s) for name, s in self._sections)

    def symbols(self, source_of: dict[str, int], prefix: str = "") -> list[Symbol]:
        """Return the functions of every table.  `source_of` numbers the sources in the order they are met."""
        out: list[Symbol] = []
        executable = {n: (s.header.sh_addr, s.header.sh_addr + s.header.sh_size)
                      for n, (_, s) in enumerate(self._sections) if s.header.sh_flags & _SHF_EXECINSTR}  # fmt: skip
        arm = self._file.header.e_machine in _ARM
        # The full table first: where both have a name, it is the full table's.
        for kind, label in (("SHT_SYMTAB", "symtab"), ("SHT_DYNSYM", "dynsym")):
            for _, section in self._sections:
                if section.header.sh_type == kind and self._bytes(section):
                    number = source_of.setdefault(prefix + label, len(source_of))
                    out += self._rows(section, executable, number, arm=arm, whole=kind == "SHT_SYMTAB")
        mini = self._data(".gnu_debugdata", _MINI_BYTES_MAX)
        if mini and not prefix:
            inner = Elf(io.BytesIO(_decompressed(mini)))
            number = source_of.setdefault("minidebuginfo", len(source_of))
            for symbol in inner.symbols({"minidebuginfo": number, "symtab": number, "dynsym": number}):
                out.append(symbol)
        return out

    def go_functions(self, source_of: dict[str, int]) -> list[Symbol]:
        """Return the functions of a Go program's own table."""
        for name, section in self._sections:
            if name in (".gopclntab", ".data.rel.ro.gopclntab"):
                text = self._file.get_section_by_name(".text")
                found = gopclntab.functions(
                    self._read(section, _SECTION_BYTES_MAX), self.order, text.header.sh_addr if text else 0
                )
                if found:
                    number = source_of.setdefault("gopclntab", len(source_of))
                    return [Symbol(begin, end, function, 1, number) for begin, end, function in found]
        return []

    def _rows(
        self, section: Any, executable: dict[int, tuple[int, int]], source: int, *, arm: bool, whole: bool
    ) -> Iterable[Symbol]:
        strings = self._sections[section.header.sh_link][1]
        text = self._read(strings, _SECTION_BYTES_MAX)
        row = struct.Struct(self.order + ("IBBHQQ" if self._wide else "IIIBBH"))
        data = self._read(section, row.size * _SYMBOLS_MAX)
        for fields in row.iter_unpack(data[: len(data) // row.size * row.size]):
            if self._wide:
                at, info, _, index, value, size = fields
            else:
                at, value, size, info, _, index = fields
            kind = info & 15
            if index not in executable or not (kind in _FUNCTIONS or kind == _NO_TYPE) or at >= len(text):
                continue
            if arm and kind in _FUNCTIONS and not self._wide:
                value &= ~1  # bit 0 says Thumb
            low, high = executable[index]
            if not low <= value < high:
                continue
            end = text.find(b"\0", at, at + _NAME_BYTES_MAX)
            name = text[at : end if end >= 0 else at + _NAME_BYTES_MAX].partition(b"@")[0]
            if not name or (arm and name.startswith((b"$x", b"$d", b"$a", b"$t"))):
                continue
            if size:
                yield Symbol(value, min(value + size, high), name, info >> 4, source)
            else:
                # Written in assembly.  In a whole table the next symbol ends it; in one of exported names only,
                # what follows may be anything, so it covers its first byte.
                yield Symbol(
                    value, high if whole else value + 1, name, info >> 4, source, unsized=True, open_ended=whole
                )

    def _bytes(self, section: Any) -> int:
        return 0 if section.header.sh_type == "SHT_NOBITS" else int(section.header.sh_size)

    def _data(self, name: str, most: int) -> bytes | None:
        for found, section in self._sections:
            if found == name and self._bytes(section):
                return self._read(section, most)
        return None

    def _read(self, section: Any, most: int) -> bytes:
        if section.header.sh_size > most:
            raise ValueError(f"a section of {section.header.sh_size} bytes")
        if not self._bytes(section):
            return b""
        if section.header.sh_offset + section.header.sh_size > self._length:
            raise ValueError("a section beyond the end of the file")
        stream = self._file.stream
        stream.seek(section.header.sh_offset)
        return bytes(stream.read(section.header.sh_size))


def _decompressed(data: bytes) -> bytes:
    reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MINI_MEMORY_MAX)
    out = reader.decompress(data, _MINI_BYTES_MAX)
    if not reader.eof:
        raise ValueError("compressed symbols are cut or too large")
    return out


def ranges(symbols: Iterable[Symbol]) -> list[Range]:
    """Return who covers what, sorted and without overlaps.

    At each address the function that begins last wins, for functions that lie in others are the finer answer; of
    several that begin together the one with the best name.  Nobody covers what lies behind a function's end.
    """
    best: dict[tuple[int, int, bool], Symbol] = {}
    for symbol in symbols:
        key = (symbol.begin, symbol.end, symbol.open_ended)
        if key not in best or symbol.rank < best[key].rank:
            best[key] = symbol
    begins = sorted({begin for begin, _, _ in best})
    following = dict(zip(begins, [*begins[1:], 1 << 64], strict=False))
    sized: list[Symbol] = []
    for symbol in best.values():
        if symbol.open_ended:
            symbol.end = min(symbol.end, following[symbol.begin])
        sized.append(symbol)
    sized.sort(key=lambda s: (s.begin, s.rank))
    names: dict[bytes, str] = {}
    out: list[Range] = []
    open_: list[tuple[int, tuple[object, ...], int, Symbol]] = []

    def cover(begin: int, end: int) -> None:
        """Say who covers these addresses, at which nobody new begins."""
        while begin < end:
            while open_ and open_[0][3].end <= begin:
                heappop(open_)
            if not open_:
                return
            top = open_[0][3]
            stop = min(end, top.end)
            if top.name not in names:
                names[top.name] = demangled(top.name)
            if out and out[-1].end == begin and (out[-1].symbol_begin, out[-1].name, out[-1].source) == (
                top.begin, names[top.name], top.source
            ):  # fmt: skip
                out[-1] = Range(out[-1].begin, stop, top.begin, out[-1].name, top.source)
            else:
                out.append(Range(begin, stop, top.begin, names[top.name], top.source))
            begin = stop

    for index, symbol in enumerate(sized):
        if index and symbol.begin > sized[index - 1].begin:
            cover(sized[index - 1].begin, symbol.begin)
        heappush(open_, (-symbol.begin, symbol.rank, index, symbol))
    if sized:
        cover(sized[-1].begin, 1 << 64)
    return out
