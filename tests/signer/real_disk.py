"""What a real file system does to a chain.  Run in a mount namespace of its own: it mounts, and never unmounts.

    unshare --mount python -m tests.signer.real_disk full tmpfs|ext4 FOLDER     the disk is full, then is not
    unshare --mount python -m tests.signer.real_disk read-only ext4 FOLDER      the kernel stops writing in the middle

Ends with 0 when all that was acknowledged is there.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

from tests.evidence.chain_maker import COVERAGE, Node, Source, one

from stella_shared.evidence import names
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.verify import verify_chain

SIZE_KIB = 2048


def mount(kind: str, folder: Path) -> Path:
    """Mount a small file system in `folder` and return where."""
    at = folder / "disk"
    at.mkdir()
    if kind == "tmpfs":
        _call("mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "none", str(at))
    else:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(SIZE_KIB << 10)
        _call("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        _call("mount", "-o", "loop", str(image), str(at))
    return at


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


def expect(report: ChainReport, source: Source) -> None:
    """Make sure that exactly the source's lines are there, and add up."""
    assert report.faults == [], report.faults
    assert report.lines == sum(source.at.values()), (report.lines, source.at)
    assert report.totals.lost == 0


def full(kind: str, folder: Path) -> None:
    """Fill the disk, knock at it, make room, and go on, in the same life and in the next one."""
    at = mount(kind, folder)
    node, source = Node(at, "node-a"), Source("node-a")
    ballast = at / "ballast"
    ballast.write_bytes(b"\0" * (512 << 10))
    store = node.open()
    acknowledged, refused = 0, 0
    batch = source.batch({0: 400}, coverage=COVERAGE)
    while refused < 3:
        try:
            store.commit(*one(batch))
        except OSError as e:
            assert e.errno == errno.ENOSPC, e
            refused += 1
            # Whoever verifies meanwhile finds what was acknowledged, and no fault.
            assert verify_chain(node.evidence).faults == []
        else:
            assert not refused, "a full disk took a commit"
            acknowledged += 1
            batch = source.batch({0: 400})
    # A killed signer finds the disk full as it comes back; it needs no space to wait.
    store.release()
    try:
        node.open().release()
    except OSError as e:
        assert e.errno == errno.ENOSPC, e
    assert verify_chain(node.evidence).faults == []
    ballast.unlink()
    store = node.open()
    kept = [n for n in range(acknowledged + 1) if store.is_settled(source.run, n)]
    assert kept == list(range(acknowledged)), (kept, acknowledged)
    store.commit(*one(batch))
    # Full again, as the chunk is to be closed.
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 1024):
                pass
        except OSError as e:
            assert e.errno == errno.ENOSPC, e
    try:
        store.close("size")
    except OSError as e:
        assert e.errno == errno.ENOSPC, e
        assert verify_chain(node.evidence).faults == []
    ballast.unlink()
    store.close("size")
    store.commit(*one(source.batch({}, final=True)))
    store.close("stop")
    store.release()
    expect(verify_chain(node.evidence), source)
    assert acknowledged > 3, acknowledged
    assert not list(at.rglob("*.tmp"))


def read_only(kind: str, folder: Path) -> None:
    """Let the kernel stop the file system as it does after an error of the device; mount it again, and go on."""
    at = mount(kind, folder)
    node, source = Node(at, "node-a"), Source("node-a")
    store = node.open()
    store.commit(*one(source.batch({0: 40}, coverage=COVERAGE)))
    batch = source.batch({0: 30})
    _call("mount", "-o", "remount,abort", str(at))
    for _ in range(3):
        try:
            store.commit(*one(batch))
        except OSError as e:
            assert e.errno in (errno.EROFS, errno.EIO), e
        else:
            raise AssertionError("a file system that was stopped took a commit")
    try:
        store.close("stop")
    except OSError as e:
        assert e.errno in (errno.EROFS, errno.EIO), e
    else:
        raise AssertionError("a file system that was stopped took a chunk")
    store.release()
    try:
        node.open().release()
    except OSError as e:
        assert e.errno in (errno.EROFS, errno.EIO), e
    assert verify_chain(node.evidence).faults == []
    _call("umount", str(at))
    _call("mount", "-o", "loop", str(folder / "image"), str(at))
    store = node.open()
    assert store.is_settled(source.run, 0) and not store.is_settled(source.run, 1)
    store.commit(*one(batch))
    store.commit(*one(source.batch({}, final=True)))
    store.close("stop")
    store.release()
    assert not node.file(store.index, names.OPEN_DATA).exists()
    expect(verify_chain(node.evidence), source)


if __name__ == "__main__":
    what, kind, folder = sys.argv[1:]
    {"full": full, "read-only": read_only}[what](kind, Path(folder))
