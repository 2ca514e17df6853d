"""Symbols are held to binutils: every function of real libraries, and what is inlined where."""

from __future__ import annotations

import base64
import contextlib
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stella_enricher.symbols import child, elf, gopclntab
from stella_enricher.symbols.capturing import Captured, Limits, capture
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.names import demangled
from stella_enricher.symbols.resolver import Resolver
from stella_enricher.symbols.store import Store
from stella_enricher.symbols.table import Head, Range, Table, encode
from stella_shared import elf_notes
from stella_shared.symbols import REASONS, Frame, Question, is_build_id
from tests.enricher import symbol_oracles as oracle

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu") if Path("/usr/lib/x86_64-linux-gnu").exists() else Path("/usr/lib")


def resolver(*directories: Path) -> Resolver:
    """Return a resolver without a store."""
    return Resolver(Finder(directories), None, max_answers=1_000_000, max_table_bytes=1 << 30)


def check_every_function(path: Path, table: Path, *, dynamic: bool, with_: Resolver | None = None) -> int:
    """Hold begin, middle and end of each function to readelf's table; return how many offsets were compared."""
    r = with_ or resolver()
    build_id = oracle.build_id(path)
    assert "" == r.load(build_id, path=path)
    where = oracle.segments(path)
    functions = oracle.functions(table, dynamic=dynamic)
    spelling = oracle.demangled({name for names in functions.values() for name in names})
    rows = sorted(functions)
    names_at: dict[int, set[str]] = {}
    points = sorted({p for begin, size in rows for p in (begin, begin + size // 2, begin + size - 1)})
    # Who covers each point, the latest begin first: by walking the sorted rows once.
    open_rows: list[tuple[int, int]] = []
    at = 0
    for point in points:
        while at < len(rows) and rows[at][0] <= point:
            open_rows.append(rows[at])
            at += 1
        open_rows = [row for row in open_rows if row[0] + row[1] > point]
        latest = max(row[0] for row in open_rows)
        names_at[point] = {n for row in open_rows if row[0] == latest for n in functions[row]}
    compared = 0
    wrong = []
    for point, names in names_at.items():
        offset = oracle.offset_of(where, point)
        if offset is None:
            continue
        answer = r.resolve(Question(build_id, offset))
        compared += 1
        if answer.symbol is None or not any(oracle.same(answer.symbol, spelling.get(n, n), n) for n in names):
            wrong.append((hex(point), answer, names))
    assert not wrong, (len(wrong), compared, wrong[:5])
    return compared


@pytest.mark.parametrize(
    ("path", "least"),
    [
        (LIBRARIES / "libc.so.6", 6000),
        (LIBRARIES / "libssl.so.3", 1500),
        (LIBRARIES / "libcrypto.so.3", 9000),
        (LIBRARIES / "libstdc++.so.6", 10000),
    ],
    ids=lambda v: v.name if isinstance(v, Path) else "",
)
def test_every_exported_function_of_a_stripped_library(path: Path, least: int) -> None:
    """First, middle and last byte of each function have its name, whatever alias is chosen."""
    assert check_every_function(path, path, dynamic=True) > least


def test_every_function_of_python() -> None:
    """The same for Debian's Python, a library where it is installed, and else the program."""
    candidates = [*LIBRARIES.glob("libpython3.*.so.1.0"), Path("/usr/bin/python3").resolve()]
    path = next(path for path in candidates if path.exists())
    assert check_every_function(path, path, dynamic=True) > 3000


C_SOURCE = """
#include <stdio.h>
#include <stdlib.h>
static inline __attribute__((always_inline)) int inner(int x) { return x * rand() + getchar(); }
static inline __attribute__((always_inline)) int outer(int x) { int y = inner(x); return y + 3 * rand(); }
__attribute__((noinline)) int caller(int x) { return outer(x) + 1; }
static __attribute__((noinline)) int local_one(int x) { return inner(x) ^ rand(); }
int main(int n, char **v) { printf("%d %d\\n", caller(n), local_one(n)); return outer(n); }
"""
CXX_SOURCE = """
#include <map>
#include <string>
#include <vector>
#include <cstdio>
namespace shop {
struct Basket {
    std::map<std::string, std::vector<int>> rows;
    __attribute__((noinline)) int sum(const std::string &name) const {
        int out = 0;
        auto found = rows.find(name);
        if (found != rows.end()) for (int one : found->second) out += one;
        return out;
    }
    template <typename T> __attribute__((noinline))
    void put(const std::string &name, T value) { rows[name].push_back(value); }
};
}
int main(int n, char **v) {
    shop::Basket b;
    for (int i = 0; i < n; i++) { b.put<int>(v[i], i); b.put<short>(v[0], i); }
    printf("%d\\n", b.sum(v[0]));
}
"""


def build(tmp: Path, source: str, compiler: str = "gcc", *flags: str, name: str = "program") -> Path:
    """Return a program made of a source."""
    file = tmp / f"{name}.{'cc' if compiler == 'g++' else 'c'}"
    file.write_text(source)
    out = tmp / name
    oracle.run(compiler, "-w", "-O2", "-Wl,--build-id", *flags, "-o", out, file)
    return out


def symbol_of(path: Path, name: str, r: Resolver, build_id: str = "", plus: int = 0) -> Frame:
    """Return the answer for an address of a function, found by nm in a file that has it."""
    address = next(a for (a, _), names in oracle.functions(path).items() if name in names)
    offset = oracle.offset_of(oracle.segments(path), address + plus)
    assert offset is not None
    return r.resolve(Question(build_id or oracle.build_id(path), offset))


@pytest.mark.parametrize("flags", [["-pie", "-fPIE"], ["-no-pie"], ["-static"], ["-Wl,-z,noseparate-code"]])
def test_offsets_become_addresses_whatever_the_layout(tmp_path: Path, flags: list[str]) -> None:
    """Position-independent, at a fixed address, static, with code in the first segment: every function is found."""
    program = build(tmp_path, C_SOURCE, "gcc", *flags)
    assert check_every_function(program, program, dynamic=False) >= 9


@pytest.mark.parametrize(("source", "compiler"), [(C_SOURCE, "gcc"), (CXX_SOURCE, "g++")], ids=["C", "C++"])
@pytest.mark.parametrize("flag", ["-pie", "-no-pie"])
def test_inlined_functions_are_those_of_addr2line(tmp_path: Path, source: str, compiler: str, flag: str) -> None:
    """At every byte of every function of ours, the chain of inlined functions is addr2line's."""
    program = build(tmp_path, source, compiler, "-g", flag, *(["-fPIE"] if flag == "-pie" else []))
    build_id, where = oracle.build_id(program), oracle.segments(program)
    r = resolver()
    assert "" == r.load(build_id, path=program)
    skipped = ("_start", "_init", "_fini", "_dl_relocate_static_pie")
    addresses = [
        a
        for (begin, size), names in oracle.functions(program).items()
        if not names & set(skipped) and oracle.offset_of(where, begin) is not None
        for a in range(begin, begin + size)
    ]
    expected = oracle.inline_chains(program, addresses)
    spelling = oracle.demangled({name for chain in expected for name in chain})
    differ = 0
    deep = 0
    for address, chain in zip(addresses, expected, strict=True):
        offset = oracle.offset_of(where, address)
        assert offset is not None
        inlined = r.resolve(Question(build_id, offset)).inlined or []
        deep += bool(chain)
        differ += len(chain) != len(inlined) or not all(
            oracle.same(ours, spelling[name], name) for ours, name in zip(inlined, chain, strict=True)
        )
    assert len(addresses) > 100
    assert deep > 50
    # At a few edges of an optimised program's ranges the two readers disagree by an instruction.
    assert differ * 200 <= len(addresses), (differ, len(addresses))


def test_the_libc_debug_file_gives_static_functions_and_inlined_ones() -> None:
    """Found by build-id below /usr/lib/debug, it agrees with addr2line at thousands of places."""
    libc = LIBRARIES / "libc.so.6"
    build_id = oracle.build_id(libc)
    debug = Path("/usr/lib/debug/.build-id") / build_id[:2] / f"{build_id[2:]}.debug"
    if not debug.exists():
        pytest.skip("libc6-dbg is not installed")
    r = resolver(Path("/usr/lib/debug"))
    assert check_every_function(libc, debug, dynamic=False, with_=r) > 9000
    rows = sorted(oracle.functions(debug))
    drawn = random.Random(5)
    addresses = [begin + drawn.randrange(size) for begin, size in (drawn.choice(rows) for _ in range(3000))]
    expected = oracle.inline_chains(debug, addresses)
    where = oracle.segments(libc)
    same = 0
    for address, chain in zip(addresses, expected, strict=True):
        offset = oracle.offset_of(where, address)
        assert offset is not None
        same += chain == (r.resolve(Question(build_id, offset)).inlined or [])
    assert same >= 2970, same


def strip_into(program: Path, debug: Path) -> None:
    """Move the symbols of a program into a separate file that the program names."""
    oracle.run("objcopy", "--only-keep-debug", program, debug)
    oracle.run("objcopy", "--strip-all", f"--add-gnu-debuglink={debug}", program)


def test_a_separate_debug_file_by_build_id(tmp_path: Path) -> None:
    """DIRECTORY/.build-id/xx/rest.debug is found; without it the same file is called stripped."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    whole = shutil.copy(program, tmp_path / "whole")
    build_id = oracle.build_id(program)
    kept = tmp_path / "debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    kept.parent.mkdir(parents=True)
    strip_into(program, kept)
    r = resolver()
    r.load(build_id, path=program)
    assert ("stripped", None) == ((frame := symbol_of(whole, "local_one", r)).reason, frame.symbol)
    r = resolver(tmp_path / "debug")
    r.load(build_id, path=program)
    frame = symbol_of(whole, "local_one", r, plus=1)
    assert ("local_one", 1, "debug_file:symtab", "glibc") == (
        frame.symbol, frame.symbol_offset, frame.symbol_source, frame.libc
    )  # fmt: skip


def test_a_separate_debug_file_by_link_counts_when_its_crc_fits(tmp_path: Path) -> None:
    """The file that .gnu_debuglink names is used beside the program and in .debug; a changed one is not."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    whole = shutil.copy(program, tmp_path / "whole")
    build_id = oracle.build_id(program)
    debug = tmp_path / "program.debug"
    strip_into(program, debug)
    r = resolver()
    r.load(build_id, path=program)
    assert "local_one" == symbol_of(whole, "local_one", r).symbol
    (tmp_path / ".debug").mkdir()
    debug.rename(tmp_path / ".debug/program.debug")
    r = resolver()
    r.load(build_id, path=program)
    assert "local_one" == symbol_of(whole, "local_one", r).symbol
    with (tmp_path / ".debug/program.debug").open("ab") as file:
        file.write(b"x")
    r = resolver()
    r.load(build_id, path=program)
    assert "stripped" == symbol_of(whole, "local_one", r).reason


def test_mini_debug_information(tmp_path: Path) -> None:
    """Static functions of a stripped program come out of its .gnu_debugdata."""
    program = build(tmp_path, C_SOURCE, "gcc")
    whole = shutil.copy(program, tmp_path / "whole")
    mini = tmp_path / "mini"
    oracle.run("objcopy", "-S", "--remove-section", ".comment", "--keep-symbol=local_one", program, mini)
    (tmp_path / "mini.xz").write_bytes(lzma.compress(mini.read_bytes()))
    oracle.run("objcopy", "--strip-all", "--add-section", f".gnu_debugdata={tmp_path / 'mini.xz'}", program)
    r = resolver()
    assert "" == r.load(oracle.build_id(program), path=program)
    frame = symbol_of(whole, "local_one", r)
    assert ("local_one", "minidebuginfo") == (frame.symbol, frame.symbol_source)
    assert "stripped" != symbol_of(whole, "caller", r).reason


@pytest.mark.skipif(not shutil.which("musl-gcc"), reason="musl-tools is not installed")
@pytest.mark.parametrize(("flags", "libc"), [(["-static"], None), ([], "musl")])
def test_musl_programs(tmp_path: Path, flags: list[str], libc: str | None) -> None:
    """Static and dynamic programs against musl resolve like others; the dynamic one says which libc it is."""
    program = build(tmp_path, C_SOURCE, "musl-gcc", *flags)
    r = resolver()
    assert check_every_function(program, program, dynamic=False, with_=r) >= 9
    assert libc == symbol_of(program, "caller", r).libc


def go_program() -> Path:
    """Return the bus server that the package brings: a Go program that keeps both tables."""
    path = Path(sys.executable).with_name("nats-server")
    assert path.exists()
    return path


def test_a_go_program_without_symbols(tmp_path: Path) -> None:
    """Stripped, a Go program still has every function, by .gopclntab; before, the two tables say the same."""
    whole = go_program()
    program = Path(shutil.copy(whole, tmp_path / "server"))
    oracle.run("objcopy", "--strip-all", program)
    build_id, where = oracle.build_id(whole), oracle.segments(whole)
    functions = oracle.functions(whole)
    by_table, by_symbols = resolver(), resolver()
    assert ("", "") == (by_table.load(build_id, path=program), by_symbols.load(build_id, path=whole))
    compared = 0
    differ: list[tuple[str, str]] = []
    for (begin, size), names in functions.items():
        for address in (begin, begin + size - 1):
            offset = oracle.offset_of(where, address)
            assert offset is not None
            question = Question(build_id, offset)
            symbols, table = by_symbols.resolve(question), by_table.resolve(question)
            assert symbols.symbol in names
            assert symbols.symbol is not None
            # The assembler marks its own calling convention in one of them.
            if (
                table.symbol not in (None, symbols.symbol, symbols.symbol.removesuffix(".abi0"))
                and table.symbol.replace("·", ".") != symbols.symbol
            ):
                differ.append((table.symbol, symbols.symbol))
            compared += table.symbol is not None
            assert table.symbol_source in ("gopclntab", None)
    assert compared > 25_000
    assert not differ


#: `rustc -O` of two functions with names of the older and the newer scheme, as the object file's symbols show them.
RUST_NAMES = [
    ("_ZN4core3fmt9Formatter3pad17h8e9d1b0d6d2b8d3eE", "core::fmt::Formatter::pad"),
    ("_ZN54_$LT$$RF$T$u20$as$u20$core..convert..Into$LT$U$GT$$GT$4into17h0123456789abcdefE",
     "<&T as core::convert::Into<U>>::into"),
    ("_RNvNtCs1234_7mycrate3foo3bar", "mycrate::foo::bar"),
    ("_RINvNtC3std3mem8align_ofdE", "std::mem::align_of::<f64>"),
    ("_RNvMs0_NtCs5l0EXMQXRMU_21rustc_data_structures8owningINtB5_9OwningRefmE3new", None),
    ("_ZN3foo3barEv", "foo::bar()"),
    ("_Zgarbage", "_Zgarbage"),
    ("main", "main"),
]  # fmt: skip


@pytest.mark.parametrize(("mangled", "expected"), RUST_NAMES, ids=[m[:24] for m, _ in RUST_NAMES])
def test_names_of_rust_and_cxx(mangled: str, expected: str | None) -> None:
    """Both of Rust's schemes and C++ are written as their programmers write them; anything else stays."""
    found = demangled(mangled.encode())
    if expected is not None:
        assert expected == found
    assert found


@pytest.mark.skipif(
    not shutil.which("rustc"), reason="rustc is not installed; names of both its schemes are tested above"
)
def test_a_rust_program(tmp_path: Path) -> None:
    """Functions of a program, and of the standard library in it, have the names that c++filt gives."""
    source = tmp_path / "shop.rs"
    source.write_text(
        "mod shop { pub struct Till { pub sum: u64 } impl Till { #[inline(never)] pub fn add(&mut self, n: u64) "
        "{ self.sum = self.sum.wrapping_mul(n) + 1; } } }\n"
        "fn main() { let mut t = shop::Till { sum: 1 }; for a in std::env::args() { t.add(a.len() as u64); } "
        'println!("{}", t.sum); }\n'
    )
    program = tmp_path / "shop"
    link = "link-arg=-Wl,--build-id"
    oracle.run("rustc", "-O", "-C", "symbol-mangling-version=v0", "-C", link, "-o", program, source)
    build_id, where = oracle.build_id(program), oracle.segments(program)
    r = resolver()
    assert "" == r.load(build_id, path=program)
    functions = oracle.functions(program)
    spelling = dict(zip(
        (names := sorted({n for found in functions.values() for n in found})),
        oracle.run("c++filt", "-s", "rust", data="\n".join(names)).splitlines(), strict=True,
    ))  # fmt: skip
    compared = 0
    for (begin, size), found in functions.items():
        rust = {n for n in found if n.startswith(("_R", "_ZN")) and spelling[n] != n}
        offset = oracle.offset_of(where, begin + size - 1)
        if not rust or rust != found or offset is None:
            continue
        symbol = r.resolve(Question(build_id, offset)).symbol
        assert symbol is not None
        assert any(oracle.same(symbol, _without_disambiguators(spelling[n]), n) for n in found), (symbol, found)
        compared += 1
    assert compared > 100
    assert any("shop::Till" in (r.resolve(Question(build_id, oracle.offset_of(where, b) or 0)).symbol or "")
               for b, _ in functions)  # fmt: skip


def _without_disambiguators(name: str) -> str:
    """Take off what binutils adds and nobody writes: the hash of the older scheme, in the newer one of
    crates, and the types of numbers."""
    name = re.sub(r"(?<=\d): (?:u|i)(?:8|16|32|64|128|size)\b", "", name)
    return re.sub(r"\[[0-9a-f]{1,16}\]", "", re.sub(r"::h[0-9a-f]{16}$", "", name))


def test_addresses_that_nobody_covers_have_a_reason_and_no_name(tmp_path: Path) -> None:
    """Between functions, in data, beyond the file: never the nearest name."""
    program = build(tmp_path, C_SOURCE, "gcc")
    build_id = oracle.build_id(program)
    r = resolver()
    r.load(build_id, path=program)
    covered = {a for begin, size in oracle.functions(program) for a in range(begin, begin + size)}
    (offset, _, begin), *_ = oracle.segments(program)
    rows = sorted(b for b, _ in oracle.functions(program))
    gaps = [r.resolve(Question(build_id, a - begin + offset)) for a in range(rows[0], rows[-1]) if a not in covered]
    # What assembly left without a size reaches to the next symbol; padding behind a C function belongs to nobody.
    assert "no_symbol" in {frame.reason for frame in gaps}
    unsized = {"_start", "deregister_tm_clones", "register_tm_clones", "frame_dummy", "__do_global_dtors_aux"}
    assert {frame.symbol for frame in gaps} <= {None, *unsized}
    assert ["no_segment"] * 3 == [r.resolve(Question(build_id, o)).reason for o in (0, 1 << 40, 2**64 - 1)]
    assert "pending" == r.resolve(Question("00" * 20, 1)).reason
    assert "no_file" == r.load("00" * 20, pids=[os.getpid()])
    assert "no_file" == r.resolve(Question("00" * 20, 1)).reason
    assert "build_id_mismatch" == resolver().load("00" * 20, path=program)
    assert {"no_file", "no_symbol", "no_segment", "build_id_mismatch", "stripped"} < set(REASONS)


def test_the_place_after_a_call_belongs_to_the_caller(tmp_path: Path) -> None:
    """A return address behind a function's last call names that function, with the offset of the address itself."""
    program = build(tmp_path, C_SOURCE, "gcc")
    build_id, where = oracle.build_id(program), oracle.segments(program)
    r = resolver()
    r.load(build_id, path=program)
    begin, size = next(row for row, names in oracle.functions(program).items() if "caller" in names)
    end = oracle.offset_of(where, begin + size)
    assert end is not None
    frame = r.resolve(Question(build_id, end, after_call=True))
    assert ("caller", size) == (frame.symbol, frame.symbol_offset)
    assert "caller" != r.resolve(Question(build_id, end)).symbol


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    """A table depends on the file alone: not on its name, the folder, the time or the hash seed of the process."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    other = tmp_path / "elsewhere"
    other.mkdir()
    copy = Path(shutil.copy(program, other / "renamed"))
    made = []
    for path in (program, copy):
        with Finder([]).of_path(path) as (file, build_id):
            made.append(capture(build_id, file).data)
    assert made[0] == made[1]
    assert made[0]
    (symbolizer,) = re.findall(rb"stella-symbols/\d+ \S+ \S+ \S+", zlib.decompress(made[0][48:]))
    assert [b"stella-symbols/1", b"pycxxfilt", b"pyelftools", b"symbolic"] == [
        word.split(b"/")[0] if n else word for n, word in enumerate(symbolizer.rstrip(b'"},').split(b" "))
    ]


# ---- hostile files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real program of every kind of table: symbols, DWARF, notes, a debug link, compressed symbols."""
    tmp = tmp_path_factory.mktemp("small")
    program = build(tmp, C_SOURCE, "gcc", "-g")
    (tmp / "mini.xz").write_bytes(lzma.compress(program.read_bytes()))
    oracle.run(
        "objcopy", f"--add-gnu-debuglink={program}", "--add-section", f".gnu_debugdata={tmp / 'mini.xz'}", program
    )
    return program.read_bytes()


MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f", b"\xff" * 8, b"\x01\0\0\0", b"\x80"])),
    min_size=1, max_size=6,
)  # fmt: skip


def mutated(data: bytes, mutations: list[tuple[float, bytes]], cut: float, *, in_headers: bool) -> bytes:
    """Return a file with some bytes overwritten, in its tables of sections and segments when `in_headers`."""
    out = bytearray(data)
    places = [*range(16, 64), *range(64, 64 + 56 * 13), *range(len(data) - 64 * 40, len(data))]
    for where, what in mutations:
        at = places[int(where * (len(places) - 1))] if in_headers else 64 + int(where * (len(data) - 80))
        out[at : at + len(what)] = what
    return bytes(out[: max(64, int(len(out) * cut))])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS, cut=st.one_of(st.just(1.0), st.floats(0, 1)), in_headers=st.booleans())
def test_a_changed_file_is_refused_or_read_and_never_more(
    small_program: bytes, tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[float, bytes]], cut: float,
    in_headers: bool,
) -> None:  # fmt: skip
    """Reading a file with flipped, cut and overwritten parts raises nothing but what the child expects."""
    data = mutated(small_program, mutations, cut, in_headers=in_headers)
    file = os.memfd_create("mutant")
    try:
        os.write(file, data)
        found = elf_notes.build_id(lambda offset, size: os.pread(file, size, offset))
        with contextlib.suppress(child.Refused, MemoryError, *elf.REFUSALS):
            Table(child.table(found, file, -1, -1, with_inlined=True))
    finally:
        os.close(file)


@settings(max_examples=500, deadline=None)
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda b: b"\x7fELF\x02\x01" + b)))
def test_any_bytes_have_a_build_id_or_none(data: bytes) -> None:
    """The reader of notes is total."""
    found = elf_notes.build_id(lambda offset, size: data[offset : offset + size])
    assert found == "" or is_build_id(found)
    assert elf_notes.holds_code(lambda offset, size: data[offset : offset + size]) in (True, False)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400), version=st.sampled_from([1, 16, 18, 20]))
def test_any_bytes_are_a_go_table_or_none(data: bytes, version: int) -> None:
    """The reader of Go's tables is total."""
    magic = {1: 0xFFFFFFFB, 16: 0xFFFFFFFA, 18: 0xFFFFFFF0, 20: 0xFFFFFFF1}[version]
    assert isinstance(gopclntab.functions(struct.pack("<IBBBB", magic, 0, 0, 1, 8) + data, "<", 0), list)


def captured(path: Path, limits: Limits) -> Captured:
    """Return what reading a file in the child gives."""
    with Finder([]).of_path(path) as (file, build_id):
        return capture(build_id, file, limits=limits)


def test_the_child_is_bounded_in_time_memory_and_bytes(tmp_path: Path) -> None:
    """Each bound gives its reason, in the time it says; the caller goes on."""
    whole = go_program()
    assert "too_large" == captured(whole, Limits(file_bytes=1 << 20)).reason
    assert captured(whole, Limits(memory_bytes=24 << 20)).reason in ("too_large", "malformed")
    assert "malformed" == captured(whole, Limits(table_bytes=4096)).reason
    begin = time.monotonic()
    assert "timeout" == captured(whole, Limits(seconds=0)).reason
    assert time.monotonic() - begin < 5
    assert "" == captured(whole, Limits()).reason


def test_the_child_can_open_nothing() -> None:
    """Once shut in, it has no capability, and no path can be opened, be it root's own."""
    code = (
        "import os\n"
        "from stella_shared import confinement\n"
        "status = open('/proc/self/status')\n"
        "confinement.shut_in(1 << 30, 1 << 20, 5)\n"
        "rows = [line.split() for line in status]\n"
        "print(*(row[1] for row in rows if row[0] in ('CapEff:', 'NoNewPrivs:')))\n"
        "try: print(len(os.listdir('/')))\n"
        "except PermissionError as e: print(e.strerror)\n"
    )
    said = oracle.run(sys.executable, "-c", code).splitlines()
    assert ["0000000000000000 1", "Permission denied"] == said


def test_a_bomb_of_compressed_symbols_is_refused(tmp_path: Path) -> None:
    """A hundred kilobytes that become a gigabyte take neither the memory nor the child's parent."""
    program = build(tmp_path, C_SOURCE, "gcc")
    packer = lzma.LZMACompressor(preset=1)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(300)), packer.flush()])
    (tmp_path / "bomb.xz").write_bytes(bomb)
    oracle.run("objcopy", "--strip-all", "--add-section", f".gnu_debugdata={tmp_path / 'bomb.xz'}", program)
    assert captured(program, Limits()).reason in ("malformed", "too_large")


def exploding_name(levels: int) -> str:
    """Return a mangled name whose demangled form doubles with each level: f(a, b<a, a>, b<b<a, a>, b<a, a>>, …)."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    seen = ["S_", *(f"S{high}{low}_" for high in ["", *digits[1:]] for low in digits)]
    arguments = ["1a", "1bIS_S_E"]
    arguments += [f"S0_I{seen[n]}{seen[n]}E" for n in range(2, levels + 1)]
    return "_Z1f" + "".join(arguments)


@pytest.mark.parametrize("levels", [3, 45])
def test_a_name_that_explodes_costs_its_file_the_table_and_nobody_else(tmp_path: Path, levels: int) -> None:
    """Three hundred bytes that would be demangled to some 10^14 end in the child, soon and with a reason."""
    name = exploding_name(levels)
    program = build(tmp_path, f'void f(void) __asm__("{name}"); void f(void) {{}} int main() {{ f(); }}')
    begin = time.monotonic()
    found = captured(program, Limits(seconds=3, memory_bytes=256 << 20))
    assert time.monotonic() - begin < 10
    if levels < 10:
        assert "" == found.reason
        assert "f(a, b<a, a>, b<b<a, a>, b<a, a>>" in {name[:33] for name in names_of(found)}
    else:
        assert found.reason in ("malformed", "too_large", "timeout")


def names_of(found: Captured) -> set[str]:
    """Return the names of a table."""
    assert found.table is not None
    (_, size, begin), *_ = found.table.segments
    ranges = [found.table.find(address) for address in range(begin, begin + size)]
    return {one.name for one in ranges if one}


# ---- what is kept ---------------------------------------------------------------------------------------------


def test_a_table_outlives_its_file(tmp_path: Path) -> None:
    """Once read, a program may be deleted: another resolver answers from the store, the same bytes."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    build_id, where = oracle.build_id(program), oracle.segments(program)
    begin = next(b for (b, _), names in oracle.functions(program).items() if "caller" in names)
    question = Question(build_id, oracle.offset_of(where, begin) or 0)
    store = Store(tmp_path / "symbols", 1 << 20)
    r = Resolver(Finder([]), store, max_answers=10, max_table_bytes=1 << 20)
    first = r.resolve_now(question, path=program)
    program.unlink()
    again = Resolver(Finder([]), store, max_answers=10, max_table_bytes=1 << 20)
    assert first == again.resolve_now(question)
    assert ("caller", 0) == ((again.stats()["files_read"] and "") or first.symbol, first.symbol_offset)
    assert 0o600 == store.path(build_id).stat().st_mode & 0o777
    assert 0o700 == (tmp_path / "symbols").stat().st_mode & 0o777


def table_bytes(build_id: str, size: int = 0) -> bytes:
    """Return a table with one function, and as many incompressible bytes as asked for."""
    filler = base64.b64encode(random.Random(build_id).randbytes(size)).decode()
    return encode(Head(build_id, "s" + filler, ["symtab"]), [(0, 64, 64)], [Range(64, 80, 64, "f", 0)], [])


def test_what_was_changed_on_disk_is_not_believed(tmp_path: Path) -> None:
    """Any changed or missing byte fails the digest; the table is removed and the damage counted."""
    store = Store(tmp_path, 1 << 20)
    data = table_bytes("ab" * 20)
    for at in [*range(0, len(data), 7), len(data) - 1]:
        assert store.put("ab" * 20, data)
        path = store.path("ab" * 20)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert store.get("ab" * 20) is None
        assert not path.exists()
    store.put("ab" * 20, data)
    store.path("ab" * 20).write_bytes(data[:-3])
    assert store.get("ab" * 20) is None
    store.put("cd" * 20, data)
    assert store.get("cd" * 20) is None
    assert store.damaged == len(range(0, len(data), 7)) + 3


def test_the_store_is_bounded_and_the_unused_goes_first(tmp_path: Path) -> None:
    """Beyond its size the tables that were not used for longest are removed, and left-overs of a crash."""
    store = Store(tmp_path, 300_000)
    ids = [f"{n:02x}" * 20 for n in range(6)]
    for age, build_id in enumerate(ids):
        assert store.put(build_id, table_bytes(build_id, 60_000))
        os.utime(store.path(build_id), (time.time() - 90_000 + age, time.time() - 90_000 + age))
        if age == 2:
            assert store.get(ids[0]) is not None
    left = tmp_path / "00" / "half.0123.new"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    fresh = Store(tmp_path, 300_000)
    assert fresh.put("ff" * 20, table_bytes("ff" * 20, 60_000))
    assert not left.exists()
    assert store.path(ids[0]).exists()
    assert not store.path(ids[1]).exists()
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 300_000
    assert not store.put("ee" * 20, table_bytes("ee" * 20, 400_000))


def test_memory_is_bounded_by_answers_and_by_tables(tmp_path: Path) -> None:
    """Neither cache grows beyond its bound, and what fell out is answered again."""
    store = Store(tmp_path, 1 << 24)
    ids = [f"{n:02x}" * 20 for n in range(8)]
    for build_id in ids:
        store.put(build_id, table_bytes(build_id, 50_000))
    r = Resolver(Finder([]), store, max_answers=5, max_table_bytes=200_000)
    for build_id in ids * 2:
        for offset in range(16):
            assert "f" == r.resolve_now(Question(build_id, offset)).symbol
    stats = r.stats()
    assert (5, 2) == (stats["entries"], stats["tables"])
    assert stats["table_bytes"] <= 200_000


# ---- finding ---------------------------------------------------------------------------------------------------


def test_the_file_of_a_running_process_is_found_and_verified(tmp_path: Path) -> None:
    """By the mappings of a process, and only when what the path leads to now has the build-id."""
    program = build(tmp_path, '#include <unistd.h>\nint main() { write(1, "x", 1); pause(); }')
    build_id = oracle.build_id(program)
    process = subprocess.Popen([program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"x" == process.stdout.read(1)
        for wanted in (build_id, oracle.build_id(LIBRARIES / "libc.so.6")):
            with Finder([]).of_process(process.pid, wanted) as file:
                assert file >= 0
                assert wanted == elf_notes.build_id(lambda offset, size, f=file: os.pread(f, size, offset))
        other = tmp_path / "other"
        other.mkdir()
        build(other, C_SOURCE).rename(program)
        with Finder([]).of_process(process.pid, build_id) as file:
            assert -1 == file
        program.unlink()
        os.mkfifo(program)  # must neither be opened nor block
        with Finder([]).of_process(process.pid, build_id) as file:
            assert -1 == file
    finally:
        process.kill()
        process.communicate()
    with Finder([]).of_process(process.pid, build_id) as file:
        assert -1 == file


def test_libraries_of_short_programs_are_found_because_they_are_ours_too() -> None:
    """A process that is gone leaves nothing to look at; libc is mapped by whoever asks."""
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libc = Path(next(line.split()[-1] for line in mapped if line.endswith("/libc.so.6")))
    functions = oracle.functions(libc, dynamic=True)
    begin = next(begin for (begin, _), names in functions.items() if "connect" in names)
    offset = oracle.offset_of(oracle.segments(libc), begin)
    assert offset is not None
    answer = resolver().resolve_now(Question(oracle.build_id(libc), offset), pids=[gone.pid])
    assert answer.symbol in {"connect", "__connect"}, answer


IN_A_CONTAINER = """
mount -t tmpfs none "$1" && cp "$2" "$1/program" && mkdir "$1/old" && cd "$1" &&
mount --make-rprivate / && pivot_root . old && exec /program
"""


@pytest.mark.parametrize("inside", ["container", "chroot"])
def test_the_file_of_a_process_with_another_root_is_found(tmp_path: Path, inside: str) -> None:
    """With a root and mounts of its own, and with a changed root among ours."""
    source = '#include <unistd.h>\nint main() { write(1, "x", 1); pause(); }'
    program = build(tmp_path, source, "gcc", "-static")
    build_id = oracle.build_id(program)
    folder = tmp_path / "root"
    folder.mkdir()
    if inside == "container":
        command = ["unshare", "-m", "sh", "-ec", IN_A_CONTAINER, "sh", folder, program]
    else:
        shutil.copy(program, folder / "program")
        command = ["chroot", folder, "/program"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"x" == process.stdout.read(1)
        program.unlink()
        with Finder([]).of_process(process.pid, build_id) as file:
            assert build_id == elf_notes.build_id(lambda offset, size: os.pread(file, size, offset))
    finally:
        process.kill()
        process.communicate()


def test_any_file_of_a_given_folder_is_found_by_its_build_id(tmp_path: Path) -> None:
    """A folder with a stripped program and its debug file under any names is enough to resolve on another machine."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    whole = Path(shutil.copy(program, tmp_path / "whole"))
    folder = tmp_path / "given/deep"
    folder.mkdir(parents=True)
    strip_into(program, folder / "first")
    program.rename(folder / "second")
    r = Resolver(Finder([folder.parent], scan=[folder.parent]), None, max_answers=10, max_table_bytes=1 << 20)
    assert "" == r.load(oracle.build_id(whole))
    assert "local_one" == symbol_of(whole, "local_one", r).symbol
    (folder / "second").unlink()
    r = Resolver(Finder([folder.parent], scan=[folder.parent]), None, max_answers=10, max_table_bytes=1 << 20)
    assert "no_segment" == r.load(oracle.build_id(whole))
