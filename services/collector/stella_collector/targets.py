"""Who is watched: target cgroups, containers and namespaces, as the numbers the kernel compares.

A target that is not there yet is looked for again; the coverage says which are still missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound

#: Deeper cgroups than this cannot be targets (MAX_CGROUP_DEPTH of the programs).
MAX_LEVEL: Final = 11
_CONTAINER_ID = re.compile(r"^(?:[a-z-]+://)?([0-9a-f]{12,64})$")
_NAMESPACE = re.compile(r"^(pid|mnt|net):\[(\d+)\]$")


class Target(msgspec.Struct, frozen=True):
    """A target: what was asked for, and the number it has now (0: not there).  Level -1 is a namespace."""

    asked: str
    id: int
    level: int


def any_wanted(signals: Signals) -> bool:
    """Whether anything at all limits what is watched."""
    f = signals.filters
    return bool(f.target_cgroups or f.target_containers or f.target_namespaces)


def cgroup_root() -> Path:
    """Return where the cgroup v2 hierarchy is mounted, by type, for it has more than one usual place."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields, _, rest = line.partition(" - ")
            if rest.startswith("cgroup2 "):
                return Path(fields.split()[4])
    raise NotFound("no cgroup v2 hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")


def resolve(signals: Signals) -> list[Target]:
    """Find every target of the configuration.  Raises `ConfigError` for one that can never be found."""
    filters = signals.filters
    if not any_wanted(signals):
        return []
    found: list[Target] = []
    root = cgroup_root() if filters.target_cgroups or filters.target_containers else Path()
    for asked in filters.target_cgroups:
        path = (root / asked.removeprefix(str(root)).lstrip("/")).resolve()
        level = len(path.relative_to(root).parts) if path.is_relative_to(root) else MAX_LEVEL + 1
        if level > MAX_LEVEL:
            raise ConfigError(f"signals.filters.target_cgroups: {asked} is not within {MAX_LEVEL} levels of {root}")
        try:
            found.append(Target(asked, path.stat().st_ino, level))
        except OSError:
            found.append(Target(asked, 0, level))
    if filters.target_containers:
        wanted = {asked: container_id(asked) for asked in filters.target_containers}
        hits = dict.fromkeys(wanted, False)
        for path, level in _walk(root):
            for asked, prefix in wanted.items():
                if re.search(rf"(?:^|[-/]){prefix}", path.name):
                    found.append(Target(asked, path.stat().st_ino, level))
                    hits[asked] = True
        found += [Target(asked, 0, 0) for asked, hit in hits.items() if not hit]
    for asked in filters.target_namespaces:
        match = _NAMESPACE.match(asked)
        if not match:
            raise ConfigError(
                f"signals.filters.target_namespaces: {asked!r} is no namespace",
                hint="write it as `readlink /proc/PID/ns/pid` shows it: pid:[4026531836] (pid, mnt or net)",
            )
        found.append(Target(asked, int(match[2]), -1))
    return found


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

    def gather(path: Path, inside: bool) -> None:
        try:
            inside = inside or path.stat().st_ino in wanted
            if inside:
                pids.update(int(line) for line in (path / "cgroup.procs").read_text().split())
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    gather(Path(entry.path), inside)
        except OSError:
            return  # removed while we looked

    gather(cgroup_root(), False)
    return sorted(pids)
