"""Who is watched: target cgroups, containers and namespaces, as the numbers the kernel compares.

A target that is not there yet is looked for again; the coverage says which are still missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound
from stella_shared.selectors import is_selector

#: Deeper cgroups than this cannot be targets (MAX_CGROUP_DEPTH of the programs).
MAX_LEVEL: Final = 11
#: STELLA_CGROUP_V1: ids of the cgroup v1 hierarchy have it added, for their numbers may be those of a v2 cgroup.
CGROUP_V1: Final = 1 << 62
#: Hex digits that an id has at the least, and where in a cgroup's name one may begin.
MIN_ID: Final = 12
_ID_STARTS = re.compile(rf"(?:^|[-/])(?=([0-9a-f]{{{MIN_ID}}}))")
_CONTAINER_ID = re.compile(r"^(?:[a-z-]+://)?([0-9a-f]{12,64})$")
_NAMESPACE = re.compile(r"^(pid|mnt|net):\[(\d+)\]$")


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """A target: what was asked for, and the number it has now (0: not there).  Level -1 is a namespace.

    `container` is the container that a selector matches, 64 hex.
    """

    asked: str
    id: int
    level: int
    container: str = ""


def any_wanted(signals: Signals) -> bool:
    """Whether anything at all limits what is watched."""
    f = signals.filters
    return bool(f.target_cgroups or f.target_containers or f.target_namespaces)


class Hierarchy(msgspec.Struct, frozen=True):
    """A mounted cgroup hierarchy; `flag` is added to its inode numbers to make ids (STELLA_CGROUP_V1)."""

    root: Path
    flag: int


def hierarchies() -> list[Hierarchy]:
    """Return cgroup v2 and, where the pids controller is still a v1 one, that; by type, for places differ."""
    found: list[Hierarchy] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.strip().split(" ", 2)
            if kind == "cgroup2" and not any(h.flag == 0 for h in found):
                found.insert(0, Hierarchy(Path(fields.split()[4]), 0))
            elif kind == "cgroup" and "pids" in options.split(" ")[-1].split(","):
                found.append(Hierarchy(Path(fields.split()[4]), CGROUP_V1))
    if not found:
        raise NotFound("no cgroup hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")
    return found


def v1_hierarchy() -> int:
    """Return the kernel's number of the cgroup v1 hierarchy of the pids controller, 0 when there is none."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            number, controllers, _ = line.split(":", 2)
            if "pids" in controllers.split(","):
                return int(number)
    return 0


def resolve(signals: Signals, selected: Mapping[str, list[str]] | None = None) -> list[Target]:
    """Find every target of the configuration.  Raises `ConfigError` for one that can never be found.

    `selected` says which containers each selector matches.
    """
    filters = signals.filters
    if not any_wanted(signals):
        return []
    found: list[Target] = []
    mounted = hierarchies() if filters.target_cgroups or filters.target_containers else []
    for asked in filters.target_cgroups:
        found += [next((t for h in mounted if (t := _cgroup(asked, h)).id), _cgroup(asked, mounted[0]))]
    if filters.target_containers:
        found += _containers(mounted, filters.target_containers, selected or {})
    for asked in filters.target_namespaces:
        match = _NAMESPACE.match(asked)
        if not match:
            raise ConfigError(
                f"signals.filters.target_namespaces: {asked!r} is no namespace",
                hint="write it as `readlink /proc/PID/ns/pid` shows it: pid:[4026531836] (pid, mnt or net)",
            )
        found.append(Target(asked, int(match[2]), -1))
    return found


def _containers(mounted: list[Hierarchy], targets: Iterable[str], selected: Mapping[str, list[str]]) -> list[Target]:
    """Find the cgroups of containers: those asked for by id, and those that selectors match."""
    wanted: list[tuple[str, str, str]] = []
    for asked in targets:
        if is_selector(asked):
            wanted += [(asked, full, full) for full in selected.get(asked, [])] or [(asked, "", "")]
        else:
            wanted.append((asked, container_id(asked), ""))
    found: list[Target] = []
    by_prefix: dict[str, list[int]] = {}
    for index, (_, prefix, _) in enumerate(wanted):
        if prefix:
            by_prefix.setdefault(prefix[:MIN_ID], []).append(index)
    hits: set[int] = set()
    for hierarchy in mounted if by_prefix else ():
        for path, level in _walk(hierarchy.root):
            for start in _ID_STARTS.finditer(path.name):
                for index in by_prefix.get(start[1], ()):
                    asked, prefix, full = wanted[index]
                    if path.name.startswith(prefix, start.start(1)) and (number := _inode(path)):
                        found.append(Target(asked, number | hierarchy.flag, level, full))
                        hits.add(index)
    return found + [Target(asked, 0, 0, full) for i, (asked, _, full) in enumerate(wanted) if i not in hits]


def _cgroup(asked: str, hierarchy: Hierarchy) -> Target:
    root = hierarchy.root
    path = (root / asked.removeprefix(str(root)).lstrip("/")).resolve()
    level = len(path.relative_to(root).parts) if path.is_relative_to(root) else MAX_LEVEL + 1
    if level > MAX_LEVEL:
        raise ConfigError(f"signals.filters.target_cgroups: {asked} is not within {MAX_LEVEL} levels of {root}")
    number = _inode(path)
    return Target(asked, number | hierarchy.flag if number else 0, level)


def _inode(path: Path) -> int:
    """Return the inode number of a cgroup's directory, 0 when it is not there."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def name_keys(targets: Iterable[str]) -> set[bytes]:
    """Return the keys by which the kernel knows target containers when their cgroups are made: 12 digits of each id.

    Selectors have none: the containers that they match have.
    """
    return {container_id(asked)[:12].encode() + bytes(4) for asked in targets if not is_selector(asked)}


def container_id(asked: str) -> str:
    """Return the hex id of a container target.  Raises `ConfigError` for what is no id."""
    match = _CONTAINER_ID.match(asked)
    if not match:
        raise ConfigError(
            f"signals.filters.target_containers: {asked!r} is no container id",
            hint="give 12 to 64 hex digits, as `docker ps --no-trunc` shows them",
        )
    return match[1]


def _walk(root: Path, level: int = 0) -> Iterator[tuple[Path, int]]:
    try:
        entries = [e for e in os.scandir(root) if e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        yield path, level + 1
        if level + 1 < MAX_LEVEL:
            yield from _walk(path, level + 1)


def processes(ids: Iterable[int]) -> list[int]:
    """Return the pids that live in the target cgroups and below, by a look at the cgroup tree."""
    wanted = set(ids)
    if not wanted:
        return []
    pids: set[int] = set()

    def gather(path: Path, flag: int, inside: bool) -> None:
        try:
            inside = inside or path.stat().st_ino | flag in wanted
            if inside:
                pids.update(int(line) for line in (path / "cgroup.procs").read_text().split())
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    gather(Path(entry.path), flag, inside)
        except OSError:
            return  # removed while we looked

    for hierarchy in hierarchies():
        gather(hierarchy.root, hierarchy.flag, False)
    return sorted(pids)
