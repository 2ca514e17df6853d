"""`--loaded`: our programs in this kernel, whoever holds them, and the pinned runs.

A program is taken for ours by its name: those of the object, and others that begin with `stella_` (of another
release).  Links of tracepoints, of BTF tracepoints and of uprobes cannot be detached by their id, in no kernel so
far; they end when the last descriptor of them is closed and their pin is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from stella_collector.kernel import BPFFS, OBJECT
from stella_collector.libbpf import Libbpf
from stella_collector.objects import LINK_PIN, PROGRAM_PIN, Object
from stella_collector.runs import LANES_PIN, pins_folder
from stella_shared.config import Signals
from stella_shared.errors import StellaError

PREFIX: Final = "stella_"
_PROGRAM: Final = re.compile(rb"^prog_id:\t(\d+)$", re.MULTILINE)
_MAP: Final = re.compile(rb"^map_id:\t(\d+)$", re.MULTILINE)


class LinkState(msgspec.Struct, frozen=True):
    """A link: whether it was detached here, or why not."""

    id: int
    detached: bool
    reason: str


class Loaded(msgspec.Struct, frozen=True):
    """A program of ours.  `tag` is as `bpftool prog` shows it; `holders` are pids that have it or a link of it open."""

    id: int
    name: str
    tag: str
    this_release: bool
    links: list[LinkState]
    holders: list[int]


class Pin(msgspec.Struct, frozen=True):
    """A pinned run.  `holders` are pids that have its counters open; none: nobody reads it.

    `own` says that the run is of the node with this configuration, `attached` that its probes are attached whether
    or not somebody reads it.  `programs` are the ids of those that are pinned.
    """

    path: str
    run: str
    own: bool
    attached: bool
    programs: list[int]
    holders: list[int]


class Found(msgspec.Struct, frozen=True):
    """What `--loaded` prints."""

    programs: list[Loaded]
    pins: list[Pin]


def look(signals: Signals, *, detach: bool) -> Found:
    """Return our programs and pins; with `detach`, detach each link that the kernel lets go of.

    Raises `NotPermitted` where programs cannot be listed (CAP_SYS_ADMIN).
    """
    lib = Libbpf()
    ours = [program for program in lib.programs() if program.name.startswith(PREFIX)]
    names = _names(lib)
    links: dict[int, list[int]] = {}
    for link, program_id in lib.links() if ours else ():
        links.setdefault(program_id, []).append(link)
    pins, own = list(_pins(lib)), pins_folder(signals)
    programs, maps = _holders()
    return Found(
        [
            Loaded(
                program.id,
                program.name,
                program.tag,
                program.name in names,
                [_link(lib, link, detach=detach) for link in links.get(program.id, [])],
                sorted(programs.get(program.id, set())),
            )
            for program in ours
        ],
        [
            Pin(str(path), path.name, path.parent == own, attached, held, sorted(maps.get(number, set())))
            for path, number, attached, held in pins
        ],
    )


def _names(lib: Libbpf) -> set[str]:
    """Return the names of this release's programs, as the kernel cuts them."""
    if not OBJECT.exists():
        return set()
    obj = Object(lib, OBJECT)
    try:
        return {name[:15] for name in obj.programs}
    finally:
        obj.close()


def _link(lib: Libbpf, number: int, *, detach: bool) -> LinkState:
    reason = lib.detach_link(number) if detach else "not asked to"
    return LinkState(number, not reason, reason)


def _holders() -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Return program id → pids with a descriptor of it or of a link of it, and map id → pids (proc_pid_fdinfo(5))."""
    programs: dict[int, set[int]] = {}
    maps: dict[int, set[int]] = {}
    for process in os.scandir("/proc"):
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process.name}/fdinfo"):
                with contextlib.suppress(OSError):
                    text = Path(entry.path).read_bytes()
                    for found, pattern in ((programs, _PROGRAM), (maps, _MAP)):
                        for number in map(int, pattern.findall(text)):
                            found.setdefault(number, set()).add(int(process.name))
    return programs, maps


def _pins(lib: Libbpf) -> Iterator[tuple[Path, int, bool, list[int]]]:
    """Yield each pinned run, the id of its counters' map (0 when it cannot be opened), and what else `Pin` says."""
    with contextlib.suppress(OSError):
        for folder in sorted((BPFFS / "stella").iterdir()):
            for run in sorted(folder.iterdir()):
                names = sorted(pin.name for pin in run.iterdir()) if run.is_dir() else []
                counters = _id(lib, run / LANES_PIN if run.is_dir() else run, _MAP)
                programs = [_id(lib, run / name, _PROGRAM) for name in names if name.startswith(PROGRAM_PIN)]
                yield run, counters, any(name.startswith(LINK_PIN) for name in names), programs


def _id(lib: Libbpf, pin: Path, pattern: re.Pattern[bytes]) -> int:
    with contextlib.suppress(StellaError):
        fd = lib.open_pinned(pin)
        try:
            match = pattern.search(Path(f"/proc/self/fdinfo/{fd}").read_bytes())
            return int(match[1]) if match else 0
        finally:
            os.close(fd)
    return 0
