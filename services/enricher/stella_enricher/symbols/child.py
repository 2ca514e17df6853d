"""Reads one file and writes its table: `python -m stella_enricher.symbols.child`, started by `capturing`.

A file out of a container is hostile until proven otherwise, and parsers of ELF and DWARF are large.  So they run
here: no capabilities, no new privileges, bounded memory, CPU time and descriptors, and nothing but two files
that are open already.  Whatever happens here ends this process and nothing else.

    argv      build-id, descriptor of the file, descriptor of the debug file or -1, CRC it must have or -1,
              whether to read what is inlined (0 or 1), bytes of memory, bytes of answer, seconds
    stdout    "T" and the table, or "R" and a reason of `stella_shared.symbols`
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from functools import partial
from importlib.metadata import version
from typing import Final

from stella_enricher.symbols import elf, inlines
from stella_enricher.symbols.elf import Elf, Symbol
from stella_enricher.symbols.names import demangled
from stella_enricher.symbols.table import VERSION, Head, encode
from stella_shared import elf_notes
from stella_shared.confinement import shut_in

SYMBOLIZER: Final = " ".join(
    [f"stella-symbols/{VERSION}", *(f"{name}/{version(name)}" for name in ("pycxxfilt", "pyelftools", "symbolic"))]
)


class Refused(Exception):
    """The file gives no table, for this reason."""


def table(build_id: str, file: int, debug: int, crc: int, *, with_inlined: bool) -> bytes:
    """Return the table of an open file and its open debug file (-1: none).  Raises `Refused`."""
    for descriptor in (file, debug):
        if descriptor >= 0:
            found = elf_notes.build_id(partial(_read, descriptor))
            if found != build_id and (descriptor == file or found):
                raise Refused("build_id_mismatch")
    if debug >= 0 and crc >= 0 and _crc(debug) != crc:
        raise Refused("crc_mismatch")
    source_of: dict[str, int] = {}
    symbols: list[Symbol] = []
    places: inlines.Places = []
    inlined_reason = "no_debug_information"
    with contextlib.ExitStack() as stack:
        main = Elf(stack.enter_context(os.fdopen(os.dup(file), "rb")))
        symbols += main.symbols(source_of)
        dwarf = file if main.has_debug_information() else -1
        if debug >= 0:
            other = Elf(stack.enter_context(os.fdopen(os.dup(debug), "rb")))
            symbols += other.symbols(source_of, "debug_file:")
            dwarf = debug if dwarf < 0 and other.has_debug_information() else dwarf
        if "symtab" not in source_of:
            symbols += main.go_functions(source_of)
        if dwarf >= 0 and not with_inlined:
            inlined_reason = "not_read"
        elif dwarf >= 0:
            try:
                base = main.base() if dwarf == file else other.base()
                places = [(base + at, chain) for at, chain in inlines.places(dwarf)]
                inlined_reason = ""
            except inlines.NotRead:
                inlined_reason = "not_read"
        segments = main.segments()
        found_ranges = elf.ranges(symbols)
        known: dict[bytes, str] = {}
        named = [(at, tuple(known.setdefault(n, "") or _named(known, n) for n in chain)) for at, chain in places]
        reason = "" if found_ranges else "stripped"
        if not segments:
            reason = "no_segment"
        head = Head(
            build_id=build_id,
            symbolizer=SYMBOLIZER,
            sources=list(source_of),
            libc=main.libc(),
            reason=reason,
            inlined_reason=inlined_reason,
            link=main.link(),
        )
    return encode(head, segments, found_ranges, named)


def _named(known: dict[bytes, str], name: bytes) -> str:
    known[name] = demangled(name)
    return known[name]


def _read(descriptor: int, offset: int, size: int) -> bytes:
    return os.pread(descriptor, size, offset)


def _crc(descriptor: int) -> int:
    crc = at = 0
    while piece := os.pread(descriptor, 1 << 20, at):
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    return crc


def main(arguments: list[str]) -> int:
    """Run the child."""
    build_id = arguments[0]
    file, debug, crc, with_inlined, memory_bytes, answer_bytes, seconds = map(int, arguments[1:])
    shut_in(memory_bytes, answer_bytes, seconds)
    try:
        answer = b"T" + table(build_id, file, debug, crc, with_inlined=bool(with_inlined))
    except Refused as e:
        answer = b"R" + str(e).encode()
    except MemoryError:
        answer = b"Rtoo_large"
    except elf.REFUSALS:
        answer = b"Rmalformed"
    with os.fdopen(1, "wb", closefd=False) as out:
        out.write(answer)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # The libraries' own endings are not needed, and a parsed giant takes long to free.
    os._exit(code)
