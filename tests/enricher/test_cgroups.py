"""The index answers cgroup ids from the real cgroup2 file system, with and without the fast way."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from stella_enricher.cgroups import CgroupIndex, Found, Mount, parse_mounts, walk

A = "a1" * 32


def cgroup2_point() -> str:
    """Return the mount point of cgroup2, or "" when there is none that we may write to."""
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    points = [m.point for m in mounts if m.fstype == "cgroup2"]
    return points[0] if points and os.access(points[0], os.W_OK) and os.geteuid() == 0 else ""


needs_cgroup2 = pytest.mark.skipif(not cgroup2_point(), reason="needs root and a writable cgroup2 mount")


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tree() -> Iterator[Path]:
    """Give a cgroup of our own, removed afterwards with all that is in it."""
    top = Path(cgroup2_point()) / f"zz-stella-test-{os.getpid()}-index"
    top.mkdir()
    yield top
    for path, _, _ in os.walk(top, topdown=False):
        Path(path).rmdir()


def test_mount_table_is_read_with_its_escapes() -> None:
    """cgroup mounts are found by file system type; octal escapes in their paths are undone."""
    text = textwrap.dedent("""\
        31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
        39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:7 - cgroup cgroup rw,pids
        41 31 0:38 /../.. /sys/fs/with\\040space rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate
        nonsense
        """)
    expected = [
        Mount("/sys/fs/cgroup/pids", "/", "cgroup", "rw,pids"),
        Mount("/sys/fs/with space", "/../..", "cgroup2", "rw,nsdelegate"),
    ]
    assert expected == parse_mounts(text)


@needs_cgroup2
@pytest.mark.parametrize("handles", [True, False])
def test_every_naming_is_found_under_the_real_mount(tree: Path, handles: bool) -> None:
    """A cgroup's inode number leads to its path, at any depth, by handle and by walk alike."""
    index = CgroupIndex(handles=handles)
    for name in (f"docker/{A}", f"system.slice/docker-{A}.scope/nested/deeper", f"kubepods/pod1/{A}"):
        path = tree / name
        path.mkdir(parents=True)
        assert Found(f"/{tree.name}/{name}") == index.find(path.stat().st_ino)
    assert Found("/") == index.find(1)
    assert handles == bool(index.stats()["by_handle"])
    assert handles == (0 == index.stats()["walks"])
    index.close()


@needs_cgroup2
@pytest.mark.parametrize("handles", [True, False])
def test_the_kernels_id_of_a_process_is_found(tree: Path, handles: bool) -> None:
    """The path agrees with /proc/PID/cgroup of a process that lives in the cgroup."""
    path = tree / "docker" / A
    path.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            (path / "cgroup.procs").write_text(str(process.pid))
            told = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
            index = CgroupIndex(handles=handles)
            assert [f"0::{index.find(path.stat().st_ino).path}"] == [t for t in told if t.startswith("0::")]
            index.close()
        finally:
            process.kill()


@needs_cgroup2
def test_without_privilege_the_walk_serves(tree: Path) -> None:
    """Where the kernel refuses handles the index walks instead, and does not try them again."""
    path = tree / "docker" / A
    path.mkdir(parents=True)
    index = CgroupIndex()
    os.seteuid(65534)
    try:
        assert Found(f"/{tree.name}/docker/{A}") == index.find(path.stat().st_ino)
    finally:
        os.seteuid(0)
    assert (0, 1) == (index.stats()["handles"], index.stats()["walks"])


@needs_cgroup2
@pytest.mark.parametrize("handles", [True, False])
def test_a_vanished_cgroup_keeps_its_path_for_a_while(tree: Path, handles: bool) -> None:
    """What was known stays known after the cgroup is gone, and is forgotten after the time given."""
    clock = Clock()
    index = CgroupIndex(handles=handles, keep_gone_seconds=60, clock=clock)
    path = tree / "short"
    path.mkdir()
    cgroup_id = path.stat().st_ino
    assert cgroup_id in index.refresh()
    path.rmdir()
    clock.now += 1
    assert [] == index.refresh()
    assert Found(f"/{tree.name}/short") == index.find(cgroup_id)
    clock.now += 61
    index.refresh()
    assert Found("", "cgroup_gone") == index.find(cgroup_id)
    index.close()


@needs_cgroup2
@pytest.mark.parametrize("handles", [True, False])
def test_what_never_was_has_a_reason(handles: bool) -> None:
    """Ids of no living cgroup, and numbers that cannot be ids, are answered with a reason."""
    index = CgroupIndex(handles=handles)
    assert "cgroup_gone" == index.find(1 << 60).reason
    assert "no_cgroup" == index.find(0).reason
    assert "no_cgroup" == index.find(-1).reason
    assert "no_cgroup" == index.find(1 << 64).reason
    index.close()


@needs_cgroup2
def test_a_storm_of_misses_walks_five_times_a_second() -> None:
    """Without handles a thousand unknown ids cost five walks, and the rest is told to come again."""
    clock = Clock()
    index = CgroupIndex(handles=False, clock=clock)
    answers = [index.find((1 << 50) + i) for i in range(1000)]
    assert ["cgroup_gone"] * 5 + ["cgroup_not_walked_yet"] * 995 == [a.reason for a in answers]
    assert not answers[-1].final
    clock.now += 1.0
    for i in range(1000):
        index.find((1 << 50) + i)
    assert 10 == index.stats()["walks"]


@needs_cgroup2
def test_memory_is_bounded(tree: Path) -> None:
    """No more than `max_entries` are remembered, and a miss then does not claim that a cgroup is gone."""
    for i in range(40):
        (tree / f"c{i}").mkdir()
    index = CgroupIndex(handles=False, max_entries=20)
    index.refresh()
    assert 20 >= len(index)
    assert Found("", "too_many_cgroups", final=False) == index.find(1 << 60)


@needs_cgroup2
def test_the_link_count_shortcut_finds_everything(tree: Path) -> None:
    """The walk, which does not list leaves, sees the same directories as a listing of everything."""
    for name in ("a/b/c", "a/d", "e"):
        (tree / name).mkdir(parents=True)
    expected = {os.stat(path).st_ino: path for path, _, _ in os.walk(tree)}
    assert (expected, False) == walk(str(tree), 1000)


@needs_cgroup2
def test_a_private_namespace_is_seen_through(tree: Path) -> None:
    """In a private cgroup namespace our own cgroup is not taken for the root, nor others for gone."""
    inner, outer = tree / "inner", tree / "outer"
    (inner / "below").mkdir(parents=True)
    outer.mkdir()
    ids = [p.stat().st_ino for p in (inner, inner / "below", outer)]
    program = textwrap.dedent(f"""\
        from stella_enricher.cgroups import CgroupIndex
        for handles in (True, False):
            index = CgroupIndex(point="/mnt", handles=handles)
            print(index.whole, *[(f.path, f.reason) for f in map(index.find, {ids})])
            index.close()
        """)
    # The shell joins the cgroup, then makes the namespaces: the cgroup becomes the root of what is seen.
    script = 'echo $$ > "$1/cgroup.procs" && exec unshare -C -m sh -c \'mount -t cgroup2 none /mnt && exec "$@"\''
    done = subprocess.run(
        ["sh", "-c", f'{script} sh "$2" -c "$3"', "sh", str(inner), sys.executable, program],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    expected = "False ('/', '') ('/below', '') ('', 'private_cgroup_namespace')\n"
    assert (expected * 2, "") == (done.stdout, done.stderr)


@needs_cgroup2
def test_containers_that_live_in_v1_alone_are_noticed(tmp_path: Path) -> None:
    """On a hybrid host, a container with a v1 cgroup and none in v2 is noticed at the second look."""
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    pids = next((m.point for m in mounts if m.fstype == "cgroup" and "pids" in m.options), "")
    if not pids:
        pytest.skip("no cgroup v1 pids hierarchy is mounted: this is not a hybrid host")
    path = Path(pids) / f"zz-stella-test-{os.getpid()}-v1" / f"docker-{A}.scope"
    path.mkdir(parents=True)
    index = CgroupIndex()
    try:
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                index.refresh()
                index.refresh()
                assert not index.hides_containers
                (path / "cgroup.procs").write_text(str(process.pid))
                index.refresh()
                index.refresh()
                assert index.hides_containers
            finally:
                process.kill()
        index.refresh()
        assert not index.hides_containers
    finally:
        index.close()
        path.rmdir()
        path.parent.rmdir()


def test_a_host_without_cgroup2_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no cgroup2 is mounted every id has the reason `no_cgroup2`, and refreshing is harmless."""
    monkeypatch.setattr("stella_enricher.cgroups.parse_mounts", lambda text: [])
    index = CgroupIndex()
    assert [] == index.refresh()
    assert Found("", "no_cgroup2") == index.find(77)
