"""The cgroup mounts of this machine, and how a test leaves them as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec


class Mount(msgspec.Struct, frozen=True):
    """A mounted cgroup hierarchy; `fstype` is cgroup or cgroup2."""

    point: str
    fstype: str


def mounts() -> list[Mount]:
    """Return the cgroup mounts."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Mount(row[1], row[2]) for row in rows if row[2] in ("cgroup", "cgroup2")]


def cgroup2_point() -> str:
    """Return the mount point of cgroup2."""
    return next(m.point for m in mounts() if m.fstype == "cgroup2")


def cgroup_of(pid: int) -> tuple[int, str]:
    """Return cgroup id and path of a process, read off the kernel."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    path = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
    return Path(cgroup2_point() + path).stat().st_ino, path


@contextlib.contextmanager
def left_as_found(*names: str) -> Iterator[None]:
    """Remove the empty cgroups `names` and the controllers that an engine of ours left on."""
    control = Path(cgroup2_point(), "cgroup.subtree_control")
    before = control.read_text()
    yield
    for mount in mounts():
        for name in names:
            for path in sorted(Path(mount.point, name).glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()
    for controller in set(control.read_text().split()) - set(before.split()):
        with contextlib.suppress(OSError):
            control.write_text(f"-{controller}")
