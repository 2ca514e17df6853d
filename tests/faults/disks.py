"""Disks of a test's own: file systems in a file, that can be slow, full, or lose power."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: _IOR('X', 125, __u32) of ext4, and "do not write the journal first".
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


class Disk:
    """An ext4 in a loop device, mounted at `at`."""

    def __init__(self, image: Path, at: Path) -> None:
        self.at = at
        self._image = image
        self.device = _attach(image)

    def mount(self) -> None:
        """Mount it; after a power cut this replays its journal."""
        subprocess.run(["mount", self.device, self.at], check=True)

    def unmount(self) -> None:
        """Unmount it once nobody uses it any more, and let its device go."""
        for _ in range(50):
            if not subprocess.run(["umount", self.at], check=False, capture_output=True).returncode:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{self.at} is still in use")
        subprocess.run(["losetup", "--detach", self.device], check=True)

    def cut_power(self) -> None:
        """End all writing at once: what was not synced by now is never on the disk."""
        fd = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def restore_power(self) -> None:
        """Mount what is on the disk, from a copy: a mount namespace somewhere may still hold the old file system."""
        self.unmount()
        copy = self._image.with_name(f"{self._image.name}-again")
        subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
        self._image, self.device = copy, _attach(copy)
        self.mount()


def _attach(image: Path) -> str:
    found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"no loop device for a disk of our own: {found.stderr.strip()}")
    return found.stdout.strip()


@contextlib.contextmanager
def mounted(image: Path, at: Path, size: int) -> Iterator[Disk]:
    """Give an empty file system of `size` bytes, mounted at `at`, and take it away afterwards."""
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    at.mkdir(parents=True)
    disk = Disk(image, at)
    disk.mount()
    (at / "lost+found").rmdir()
    try:
        yield disk
    finally:
        disk.unmount()


@contextlib.contextmanager
def slowed(disk: Disk, pid: int, bytes_per_second: int) -> Iterator[None]:
    """Let process `pid` write no faster than this to the disk, by the kernel's own throttling of its cgroup."""
    name = f"stella-test-{os.getpid()}"
    number = Path(f"/sys/class/block/{Path(disk.device).name}/dev").read_text().strip()
    v1 = Path("/sys/fs/cgroup/blkio")
    if v1.is_dir():
        group, file, row = v1 / name, "blkio.throttle.write_bps_device", f"{number} {bytes_per_second}"
    else:
        group, file, row = Path("/sys/fs/cgroup") / name, "io.max", f"{number} wbps={bytes_per_second}"
    before = _cgroup_of(pid, group.parent)
    group.mkdir()
    try:
        if not (group / file).exists():
            pytest.skip(f"this kernel cannot throttle a disk: no {file} in {group.parent}")
        (group / file).write_text(row)
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (before / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _cgroup_of(pid: int, root: Path) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "blkio" in controllers.split(",") or (number == "0" and root.name != "blkio"):
            return root / path.lstrip("/")
    return root
