"""The functions of an ELF file that can be probed.  Speaks to pyelftools and the demangler; in the child process alone.

Kept are functions that have code of their own in the file.  Left out, and counted by reason:
- `ifunc`: the symbol is that of a resolver, which the dynamic linker calls once; the function itself has other names;
- `cold`: the part of a function that the compiler has moved away; it is jumped into, never called;
- `outside`: the address lies in no part of the file that is loaded to be executed.
Names of the procedure linkage table are no functions, and symbols without a type may stand anywhere in one.
"""

from __future__ import annotations

import io
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, Final

import pycxxfilt
from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile

from stella_collector.binaries.question import SYMBOL_BYTES, Answer, Function, Matched, Question

#: What parsing hostile bytes may raise; whatever else comes up ends the child, which says the same.
REFUSALS: Final[tuple[type[Exception], ...]] = (
    ELFError, ConstructError, struct.error, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
    AssertionError, EOFError, OSError, lzma.LZMAError, zlib.error, RecursionError,
)  # fmt: skip
_SECTION_BYTES_MAX: Final = 1 << 30
_MINI_BYTES_MAX: Final = 256 << 20
_MINI_MEMORY_MAX: Final = 128 << 20
_SYMBOLS_MAX: Final = 4_000_000
_SECTIONS_MAX: Final = 65_536
_NAME_BYTES_MAX: Final = 16 << 10
_PF_X: Final = 1
_SHF_EXECINSTR: Final = 4
_STT_FUNC: Final = 2
_STT_GNU_IFUNC: Final = 10
_BINDING_RANK: Final = {1: 0, 10: 0, 2: 1, 0: 2}  # global, unique, weak, local
_COLD: Final = re.compile(rb"\.cold(\.\d+)?$")
_GO_SECTIONS: Final = {".gopclntab", ".note.go.buildid", ".go.buildinfo", ".data.rel.ro.gopclntab"}
#: By `platform.machine()`: our own, and what runs on it beside.
_MACHINES: Final[dict[str, tuple[str, ...]]] = {"x86_64": ("EM_X86_64", "EM_386"), "aarch64": ("EM_AARCH64", "EM_ARM")}


def answer(file: IO[bytes], question: Question, machine: str) -> Answer:
    """Return what `file` holds of what is asked.  Raises one of `REFUSALS` for bytes that are no ELF file."""
    elf = Elf(file)
    machines = _MACHINES.get(machine, ())
    if elf.machine not in machines:
        return Answer(reason="it is made for another machine")
    if elf.relocatable:
        return Answer(reason="it is an object file, which no process runs")
    native = elf.machine == machines[0]
    named: dict[str, int] = {}
    wanted = {name.encode(): name for name in question.named}
    matchers = [(p.entry, _Matcher(p.patterns)) for p in question.watched]
    chosen: list[dict[int, tuple[tuple[object, ...], bytes]]] = [{} for _ in matchers]
    left_out: list[dict[str, int]] = [{} for _ in matchers]
    for offset, name, rank, refused in elf.functions():
        if not refused and name in wanted:
            named.setdefault(wanted[name], offset)
        for index, (_, matcher) in enumerate(matchers):
            if not matcher.matches(name):
                continue
            if refused:
                left_out[index][refused] = left_out[index].get(refused, 0) + 1
                continue
            best = chosen[index].get(offset)
            if best is None or rank < best[0]:
                chosen[index][offset] = (rank, name)
    taken: set[int] = set()
    matched: list[Matched] = []
    for (entry, _), functions, out in zip(matchers, chosen, left_out, strict=True):
        rest = {offset: name for offset, (_, name) in functions.items() if offset not in taken}
        taken.update(rest)
        rows = [Function(at, name[:SYMBOL_BYTES], len(name)) for at, name in sorted(rest.items())]
        if len(rows) > question.functions_max:
            rows = []
        matched.append(Matched(entry, len(rest), rows, out))
    build_id = elf.build_id()
    return Answer(
        build_id=build_id if len(build_id) <= 64 else "",
        go=elf.is_go,
        native=native,
        static=elf.is_static(),
        matched=matched,
        named=named,
    )


class Elf:
    """One ELF file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._length = file.seek(0, io.SEEK_END)
        self._file = ELFFile(file)
        self._order = "<" if self._file.little_endian else ">"
        self._wide = self._file.elfclass == 64
        if self._file.num_sections() > _SECTIONS_MAX or self._file.num_segments() > _SECTIONS_MAX:
            raise ValueError("more sections or segments than files have")
        self._sections = [(s.name, s) for s in self._file.iter_sections()]
        self.machine = str(self._file.header.e_machine)
        self.relocatable = self._file.header.e_type == "ET_REL"
        self.is_go = any(name in _GO_SECTIONS for name, _ in self._sections)
        rows = [s.header for s in self._file.iter_segments("PT_LOAD")]
        self._code = [(h.p_vaddr, h.p_filesz, h.p_offset) for h in rows if h.p_flags & _PF_X and h.p_filesz]

    def is_static(self) -> bool:
        """Return whether it asks for no dynamic linker."""
        return not any(True for _ in self._file.iter_segments("PT_INTERP"))

    def build_id(self) -> str:
        """Return the GNU build-id in hex, "" when there is none."""
        for name, section in self._sections:
            if name == ".note.gnu.build-id":
                data = self._read(section, 4096)
                if len(data) > 16:
                    names, size, kind = struct.unpack_from(self._order + "III", data)
                    begin = 12 + (names + 3 & ~3)
                    if kind == 3 and data[12 : 12 + names] == b"GNU\0":
                        return data[begin : begin + size].hex()
        return ""

    def functions(self) -> Iterator[tuple[int, bytes, tuple[object, ...], str]]:
        """Yield (offset in the file, name, rank, why not) of every function; the least rank is the best name."""
        executable = {
            n for n, (name, s) in enumerate(self._sections)
            if s.header.sh_flags & _SHF_EXECINSTR and not name.startswith(".plt")
        }  # fmt: skip
        for kind in ("SHT_SYMTAB", "SHT_DYNSYM"):
            for _, section in self._sections:
                if section.header.sh_type == kind:
                    yield from self._rows(section, executable, self._code)
        for name, section in self._sections:
            if name == ".gnu_debugdata":
                inner = Elf(io.BytesIO(_decompressed(self._read(section, _MINI_BYTES_MAX))))
                # Its sections have the numbers of its own file, its addresses are ours.
                for at, table in inner._sections:
                    if table.header.sh_type == "SHT_SYMTAB" and at:
                        own = {
                            n for n, (label, s) in enumerate(inner._sections)
                            if s.header.sh_flags & _SHF_EXECINSTR and not label.startswith(".plt")
                        }  # fmt: skip
                        yield from inner._rows(table, own, self._code)

    def _rows(
        self, section: Any, executable: set[int], code: list[tuple[int, int, int]]
    ) -> Iterator[tuple[int, bytes, tuple[object, ...], str]]:
        text = self._read(self._sections[section.header.sh_link][1], _SECTION_BYTES_MAX)
        row = struct.Struct(self._order + ("IBBHQQ" if self._wide else "IIIBBH"))
        data = self._read(section, row.size * _SYMBOLS_MAX)
        thumb = self.machine == "EM_ARM"
        for fields in row.iter_unpack(data[: len(data) // row.size * row.size]):
            if self._wide:
                at, info, _, index, value, _ = fields
            else:
                at, value, _, info, _, index = fields
            kind = info & 15
            if kind not in (_STT_FUNC, _STT_GNU_IFUNC) or index not in executable or at >= len(text):
                continue
            end = text.find(b"\0", at, at + _NAME_BYTES_MAX)
            name = text[at : end if end >= 0 else at + _NAME_BYTES_MAX].partition(b"@")[0]
            if not name:
                continue
            address = value & ~1 if thumb else value  # bit 0 says Thumb
            offset = next((address - low + place for low, size, place in code if low <= address < low + size), None)
            refused = ""
            if kind == _STT_GNU_IFUNC:
                refused = "ifunc"
            elif _COLD.search(name):
                refused = "cold"
            elif offset is None or offset >= self._length:
                refused = "outside"
            yield offset or 0, name, _rank(name, info >> 4), refused

    def _read(self, section: Any, most: int) -> bytes:
        size, at = section.header.sh_size, section.header.sh_offset
        if section.header.sh_type == "SHT_NOBITS":
            return b""
        if size > most or at + size > self._length:
            raise ValueError(f"a section of {size} bytes at {at}")
        self._file.stream.seek(at)
        return bytes(self._file.stream.read(size))


def _rank(name: bytes, binding: int) -> tuple[object, ...]:
    # Of several names for one function: for users, exported, short, first in the alphabet.
    mangled = name.startswith((b"_Z", b"_R"))
    return (0 if mangled else len(name) - len(name.lstrip(b"_")), _BINDING_RANK.get(binding, 3), len(name), name)


def _decompressed(data: bytes) -> bytes:
    reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MINI_MEMORY_MAX)
    out = reader.decompress(data, _MINI_BYTES_MAX)
    if not reader.eof:
        raise ValueError("compressed symbols are cut or too large")
    return out


class _Matcher:
    """Patterns of one entry.  A C++ or Rust function is known by three names: mangled, demangled, without arguments."""

    def __init__(self, patterns: list[str]) -> None:
        self._exact = {p.encode() for p in patterns if not set(p) & set("*?")}
        globs = [p for p in patterns if set(p) & set("*?")]
        parts = ["".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in glob) for glob in globs]
        self._glob = re.compile("|".join(parts).encode(), re.DOTALL) if parts else None
        # Demangling costs 40 µs, and a mangled name holds the identifiers of the demangled one: look for these first.
        hints = [_hint(pattern) for pattern in patterns]
        self._hints = None if None in hints else tuple({hint.encode() for hint in hints if hint})
        self._known: dict[bytes, bool] = {}

    def matches(self, name: bytes) -> bool:
        """Return whether any pattern is one of the function's names."""
        known = self._known.get(name)
        if known is None:
            known = self._hit(name)
            if not known and name.startswith((b"_Z", b"_R")) and self._may_match(name):
                known = any(self._hit(other) for other in _demangled_names(name))
            self._known[name] = known
        return known

    def _may_match(self, mangled: bytes) -> bool:
        return self._hints is None or any(hint in mangled for hint in self._hints)

    def _hit(self, name: bytes) -> bool:
        return name in self._exact or (self._glob is not None and self._glob.fullmatch(name) is not None)


#: Words of demangled names that mangled ones abbreviate.
_ABBREVIATED: Final = re.compile(
    r"operator|new|delete|std|string|basic_\w*|allocator|\w?[io]?stream|char_traits|void|bool|char\d*_?t?|short|int"
    r"|long|unsigned|signed|float|double|__int128|wchar_t|const|volatile|anonymous|namespace|lambda|unnamed|type|auto"
    r"|decltype\w*|nullptr_t|_\w*|[iuf]\d+|str|usize|isize|closure|shim|impl|core|alloc"
)


def _hint(pattern: str) -> str | None:
    """Return text that the mangled name of whatever `pattern` matches must hold; None when none is sure.

    A pattern of mangled names has no use for demangled ones: "".
    """
    if pattern.startswith(("_Z", "_R")):
        return ""
    words = [w for w in re.findall(r"[A-Za-z_][A-Za-z0-9_]+", pattern) if not _ABBREVIATED.fullmatch(w)]
    return max(words, key=len) if words else None


_demangled: dict[bytes, tuple[bytes, ...]] = {}


def _demangled_names(name: bytes) -> tuple[bytes, ...]:
    if name not in _demangled:
        try:
            long = (pycxxfilt.demangle(name.decode()) or "").encode()
        except ValueError:
            long = b""
        _demangled[name] = (long, without_arguments(long)) if long else ()
    return _demangled[name]


def without_arguments(name: bytes) -> bytes:
    """Return a demangled name up to the list of arguments: `a::b<c>::d` of `a::b<c>::d(int) const`."""
    depth, at = 0, 0
    while at < len(name):
        if name.startswith((b"(anonymous namespace)", b"operator()"), at):
            at += len(b"(anonymous namespace)") if name[at : at + 1] == b"(" else len(b"operator()")
            continue
        char = name[at : at + 1]
        if name.startswith((b"operator<", b"operator>", b"operator->"), at):
            at += len(b"operator")
            while name[at : at + 1] in (b"<", b">", b"=", b"-"):
                at += 1
            continue
        if char == b"(" and not depth:
            return name[:at]
        depth += {b"<": 1, b"(": 1, b"[": 1, b">": -1, b")": -1, b"]": -1}.get(char, 0)
        at += 1
    return name
