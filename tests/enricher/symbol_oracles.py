"""What binutils says about a file, for tests that hold our answers to it."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_LOAD = re.compile(r"^  LOAD +0x(\w+) 0x(\w+) 0x\w+ 0x(\w+) 0x\w+ (...) ")
_BEHIND = re.compile(r"  *\[<other>.*$| \(\d+\)$")
_ROW = re.compile(r"^ *\d+: ([0-9a-f]+) +(\d+|0x[0-9a-f]+) (\w+) +(\w+) +\w+ +(\w+) ?(.*)$")


def run(*command: str | Path, data: str | None = None) -> str:
    """Return what a program prints; it must succeed."""
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, errors="backslashreplace", input=data
    ).stdout


def build_id(path: Path) -> str:
    """Return the GNU build-id that readelf shows."""
    return re.findall(r"Build ID: ([0-9a-f]+)", run("readelf", "-nW", path))[0]


def segments(path: Path) -> list[tuple[int, int, int]]:
    """Return (offset, size, address) of the executable segments."""
    rows = [_LOAD.match(line) for line in run("readelf", "-lW", path).splitlines()]
    return [(int(m[1], 16), int(m[3], 16), int(m[2], 16)) for m in rows if m and "E" in m[4]]


def offset_of(path_segments: list[tuple[int, int, int]], address: int) -> int | None:
    """Return where in the file an address is."""
    for offset, size, begin in path_segments:
        if begin <= address < begin + size:
            return address - begin + offset
    return None


def functions(path: Path, *, dynamic: bool = False) -> dict[tuple[int, int], set[str]]:
    """Return the mangled names by (address, size) of every sized function in a symbol table, versions taken off."""
    out: dict[tuple[int, int], set[str]] = defaultdict(set)
    for line in run("readelf", "--dyn-syms" if dynamic else "-s", "-W", path).splitlines():
        m = _ROW.match(line)
        if m and m[3] in ("FUNC", "IFUNC") and m[5] not in ("UND", "ABS") and int(m[2], 0):
            # Go's names hold spaces, and some tables of others say a thing or two behind the name.
            name = _BEHIND.sub("", m[6]).split("@")[0]
            if name:
                out[int(m[1], 16), int(m[2], 0)].add(name)
    return out


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Return names as LLVM or binutils write them, spaces between closing brackets taken out."""
    rows = list(names)
    return dict(
        zip(rows, (plain(n) for n in run("c++filt", "--no-verbose", data="\n".join(rows)).splitlines()), strict=False)
    )


def plain(name: str) -> str:
    """Return a name without what demanglers disagree about: spaces, and words for the same thing."""
    return name.replace(" ", "").replace("decltype(nullptr)", "std::nullptr_t")


def inline_chains(path: Path, addresses: list[int]) -> list[list[str]]:
    """Return for each address the functions addr2line sees there, innermost first, without the one that holds them."""
    text = run("addr2line", "-a", "-f", "-i", "-e", path, data="\n".join(map(hex, addresses)))
    out: list[list[str]] = []
    for block in re.split(r"^0x[0-9a-f]{8,}\n", text, flags=re.MULTILINE)[1:]:
        out.append(block.splitlines()[::2][:-1])
    return out


def same(ours: str, theirs: str, mangled: str) -> bool:
    """Return whether two spellings are of one name: ours may have lost its middle, or be as it stood."""
    begin, cut, end = plain(ours).partition("…")
    theirs = plain(theirs)
    return ours == mangled or (theirs.startswith(begin) and theirs.endswith(end) if cut else begin == theirs)
