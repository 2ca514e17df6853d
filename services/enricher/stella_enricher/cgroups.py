"""cgroup id → path.  The only module that reads the cgroup2 file system.

A cgroup id (u64, what `bpf_get_current_cgroup_id` returns) is the inode number of the cgroup's directory,
never used twice in one boot.  Two ways lead from it to a path:

1. `open_by_handle_at` with the kernfs handle: some 10 µs, needs CAP_DAC_READ_SEARCH.  ESTALE: the cgroup
   is gone.
2. A walk over the tree: some 10 µs for each cgroup in it.  A miss walks again, five times a second at the
   most and for no more than a twentieth of the time.

`refresh()`, once a second, walks ahead of the events: a container is then known before its first event,
and keeps its name for a while after its cgroup has gone.  Its first half, `survey()`, may run in a thread;
everything else belongs to one thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from stella_enricher.container_names import container_name

#: Inode number of the real root of a cgroup hierarchy (the kernel counts from 1).
ROOT_ID: Final = 1
#: FILEID_KERNFS of the kernel's include/linux/exportfs.h (since 5.6).
_FILEID_KERNFS: Final = 0xFE
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    """A cgroup mount: `point` is where it is, `root` which part of the hierarchy it shows, `fstype` cgroup(2)."""

    point: str
    root: str
    fstype: str
    options: str


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Return the cgroup and cgroup2 mounts in a /proc/PID/mountinfo text (proc_pid_mountinfo(5))."""
    mounts = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) > 4 and kind[0] in ("cgroup", "cgroup2"):
            point, root = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), field) for field in (fields[4], fields[3]))
            mounts.append(Mount(point, root, kind[0], kind[-1]))
    return mounts


class Found(msgspec.Struct, frozen=True):
    """A cgroup's path from the root of the hierarchy (`/docker/…`), or "" and the reason.

    `final` says that asking again cannot change the answer: ids are not used twice.
    """

    path: str
    reason: str = ""
    final: bool = True


class Survey(msgspec.Struct, frozen=True):
    """What one walk saw: {cgroup id: absolute path}, the paths of the v1 tree's containers, the time it took."""

    seen: dict[int, str]
    truncated: bool
    in_v1: list[str]
    took_ns: int


_ROOT = Found("/")
_GONE = Found("", "cgroup_gone")
_NO_CGROUP = Found("", "no_cgroup")
_NO_CGROUP2 = Found("", "no_cgroup2")
_OUTSIDE = Found("", "private_cgroup_namespace")
_TOO_MANY = Found("", "too_many_cgroups", final=False)
_NOT_YET = Found("", "cgroup_not_walked_yet", final=False)


class CgroupIndex:
    """Answers cgroup id → path, without ever blocking for longer than one walk of the tree.

    `max_entries` bounds both a walk and what is remembered; `keep_gone_seconds` is how long a vanished
    cgroup keeps its path.  `point` overrides the search for the mount, `handles=False` the fast way.
    """

    def __init__(
        self,
        *,
        point: str = "",
        max_entries: int = 65536,
        keep_gone_seconds: float = 300.0,
        walks_per_second: float = 5.0,
        handles: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._keep_gone_seconds = keep_gone_seconds
        self._walks_per_second = walks_per_second
        self._paths: OrderedDict[int, Found] = OrderedDict()
        self._gone_since: OrderedDict[int, float] = OrderedDict()
        self._truncated = False
        self._tokens = walks_per_second
        self._tokens_at = clock()
        self._not_before = 0.0
        self._walks = self._walk_ns = self._by_handle = 0
        mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(errors="replace"))
        self._mount = _best_mount(mounts, point)
        self._v1 = next((m.point for m in mounts if m.fstype == "cgroup" and "pids" in m.options), "")
        self._only_in_v1: set[str] = set()
        #: Containers are seen in the v1 tree that have no cgroup of their own in the v2 tree (an old
        #: runtime on a hybrid host): a v2 path without a container then proves nothing.
        self.hides_containers = False
        #: False when the mount shows only a part of the tree: a private cgroup namespace or a bind mount.
        self.whole = self._mount is not None and os.stat(self._mount.point).st_ino == ROOT_ID
        self._handles = _Handles.open(self._mount.point) if handles and self._mount is not None else None

    def __len__(self) -> int:
        return len(self._paths)

    def close(self) -> None:
        """Give the mount's descriptor back.  Lookups go on, by walking."""
        if self._handles is not None:
            self._handles.close()
            self._handles = None

    def find(self, cgroup_id: int) -> Found:
        """Return the path of `cgroup_id`, or the reason why it is not known.  Never raises."""
        found = self._paths.get(cgroup_id)
        if found is not None:
            self._paths.move_to_end(cgroup_id)
            return found
        if not 0 < cgroup_id < 1 << 64:
            return _NO_CGROUP
        if self._mount is None:
            return _NO_CGROUP2
        if cgroup_id == ROOT_ID:
            return _ROOT
        if self._handles is not None:
            answer = self._handles.read(cgroup_id)
            if isinstance(answer, str):
                self._by_handle += 1
                return self._remember(cgroup_id, answer)
            if answer == errno.ESTALE:
                return _GONE
            # EPERM: not for us; anything else: not on this kernel.  The walk serves.
            self.close()
        if not self._may_walk():
            return _NOT_YET
        self._walk()
        if cgroup_id in self._paths:
            return self._paths[cgroup_id]
        if not self.whole:
            return _OUTSIDE
        return _TOO_MANY if self._truncated else _GONE

    def refresh(self) -> list[int]:
        """Walk the tree and return the ids that were not known before.  Walks less often where a walk is dear."""
        survey = self.survey()
        return [] if survey is None else self.absorb(survey)

    def survey(self) -> Survey | None:
        """Walk the tree without touching the index (fit for a thread); None when it is too early for that."""
        if self._mount is None or self._clock() < self._not_before:
            return None
        begun_ns = time.perf_counter_ns()
        seen, truncated = walk(self._mount.point, self._max_entries)
        in_v1: list[str] = []
        if self._v1:
            tree, _ = walk(self._v1, self._max_entries)
            in_v1 = [p for p in tree.values() if container_name(p.removeprefix(self._v1)) and _has_processes(p)]
        return Survey(seen, truncated, in_v1, time.perf_counter_ns() - begun_ns)

    def absorb(self, survey: Survey) -> list[int]:
        """Take in what a survey saw and return the ids that were not known before."""
        new = self._merge(survey.seen, survey.truncated, survey.took_ns)
        self._compare_with_v1(survey.in_v1)
        return new

    def stats(self) -> dict[str, int]:
        """Return counters (`walks`, `walk_ns`, `by_handle`) and gauges (`cgroups`, `whole`, `handles`)."""
        return {
            "cgroups": len(self._paths),
            "walks": self._walks,
            "walk_ns": self._walk_ns,
            "by_handle": self._by_handle,
            "handles": int(self._handles is not None),
            "whole": int(self.whole),
        }

    def _remember(self, cgroup_id: int, absolute: str) -> Found:
        assert self._mount is not None
        inside = _inside(absolute, self._mount.point)
        if inside is None:
            # The handle reaches all cgroups; the name of one outside our mount does not reach us.
            return _OUTSIDE
        # A bind mount of a part of the tree says in its root where that part hangs.
        found = Found(self._mount.root.rstrip("/") + inside if not self.whole else inside)
        self._paths[cgroup_id] = found
        if len(self._paths) > self._max_entries:
            forgotten, _ = self._paths.popitem(last=False)
            self._gone_since.pop(forgotten, None)
        return found

    def _may_walk(self) -> bool:
        """Take one walk out of the bucket that refills with `walks_per_second`."""
        now = self._clock()
        burst = max(1.0, self._walks_per_second)
        self._tokens = min(burst, self._tokens + (now - self._tokens_at) * self._walks_per_second)
        self._tokens_at = now
        if self._tokens < 1.0 or now < self._not_before:
            return False
        self._tokens -= 1.0
        return True

    def _walk(self) -> None:
        assert self._mount is not None
        begun_ns = time.perf_counter_ns()
        seen, truncated = walk(self._mount.point, self._max_entries)
        self._merge(seen, truncated, time.perf_counter_ns() - begun_ns)

    def _merge(self, seen: dict[int, str], truncated: bool, took_ns: int) -> list[int]:
        self._truncated = truncated
        now = self._clock()
        for cgroup_id in self._paths:
            if cgroup_id not in seen:
                self._gone_since.setdefault(cgroup_id, now)
        new = [cgroup_id for cgroup_id in seen if cgroup_id not in self._paths]
        for cgroup_id in new:
            self._remember(cgroup_id, seen[cgroup_id])
        for cgroup_id in [c for c in self._gone_since if c in seen]:
            del self._gone_since[cgroup_id]
        while self._gone_since:
            oldest, since = next(iter(self._gone_since.items()))
            if now - since < self._keep_gone_seconds:
                break
            del self._gone_since[oldest]
            self._paths.pop(oldest, None)
        self._walks += 1
        self._walk_ns += took_ns
        # Short walks are held by the bucket alone; one of 50 ms is not repeated within the next second.
        self._not_before = now + took_ns * 20e-9 if took_ns > 10_000_000 else 0.0
        return new

    def _compare_with_v1(self, in_v1: list[str]) -> None:
        """Look for containers of the v1 pids tree that the v2 tree has not."""
        if not (in_v1 or self._only_in_v1):
            return
        in_v2 = {name.id for found in self._paths.values() if (name := container_name(found.path))}
        named = (container_name(path.removeprefix(self._v1)) for path in in_v1)
        missing = {name.id for name in named if name is not None} - in_v2
        # A container may have come between the two walks: only what is missing twice is missing.
        self.hides_containers = bool(missing & self._only_in_v1)
        self._only_in_v1 = missing


def walk(point: str, max_entries: int) -> tuple[dict[int, str], bool]:
    """Return {inode: absolute path} of the directories below and including `point`, breadth first.

    The flag says that there were more than `max_entries`.  A directory that vanishes meanwhile is left out.
    kernfs counts subdirectories in the link count, so a leaf costs one stat(2) and no listing.
    """
    seen: dict[int, str] = {}
    level = [point]
    while level:
        below: list[str] = []
        for path in level:
            try:
                status = os.stat(path, follow_symlinks=False)
                if len(seen) >= max_entries:
                    return seen, True
                seen[status.st_ino] = path
                if status.st_nlink > 2:
                    with os.scandir(path) as entries:
                        below += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
        level = below
    return seen, False


class _Handles:
    """`open_by_handle_at` on one mount (open_by_handle_at(2))."""

    def __init__(self, mount_fd: int) -> None:
        self._mount_fd = mount_fd
        self._call = ctypes.CDLL(None, use_errno=True).open_by_handle_at
        self._call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        self._call.restype = ctypes.c_int

    @classmethod
    def open(cls, point: str) -> _Handles | None:
        try:
            return cls(os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except (OSError, AttributeError):  # AttributeError: a libc without the call
            return None

    def close(self) -> None:
        os.close(self._mount_fd)

    def read(self, cgroup_id: int) -> str | int:
        """Return the absolute path of `cgroup_id`, or an errno."""
        # struct file_handle { u32 handle_bytes; int handle_type; u64 f_handle; }
        handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, cgroup_id), 16)
        fd = self._call(self._mount_fd, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if fd < 0:
            return ctypes.get_errno() or errno.EIO
        try:
            return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
        except OSError as e:
            return e.errno or errno.EIO
        finally:
            os.close(fd)


def _best_mount(mounts: list[Mount], point: str) -> Mount | None:
    """Return the cgroup2 mount that shows the whole tree, else the first that can be read, else None."""
    if point:
        return next((m for m in mounts if m.point == point), Mount(point, "/", "cgroup2", ""))
    readable: list[Mount] = []
    for mount in mounts:
        if mount.fstype == "cgroup2":
            try:
                inode = os.stat(mount.point).st_ino
            except OSError:
                continue
            if inode == ROOT_ID:
                return mount
            readable.append(mount)
    return readable[0] if readable else None


def _inside(absolute: str, point: str) -> str | None:
    if absolute == point:
        return "/"
    return absolute[len(point) :] if absolute.startswith(point.rstrip("/") + "/") else None


def _has_processes(path: str) -> bool:
    try:
        return bool(Path(path, "cgroup.procs").read_bytes())
    except OSError:
        return False
