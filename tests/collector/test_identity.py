"""Who did it, and under which name: taken from the kernel with the event, true when everything is gone again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from stella_collector import naming, targets
from stella_collector.naming import REMEMBERED_MAX, KernelProgram, Namer, Question, Remembered, read_build_id
from stella_shared import events, raw_batches
from stella_shared.events import FileOpen, ProcessExec
from stella_shared.raw_batches import Record
from stella_shared.wire import Program
from tests.collector.conftest import Watch, Watched
from tests.enricher.record_maker import file_open, record
from tests.system.node import Cgroup

Start = Callable[..., Watch]
pytestmark = pytest.mark.anyio


def opens(seen: Watched, name: str) -> list[tuple[Record, FileOpen]]:
    """Return the opens of files whose path ends so, with their records."""
    pairs = zip(seen.records, seen.events(), strict=True)
    return [(r, e) for r, e in pairs if isinstance(e, FileOpen) and (e.path or "").endswith(name)]


def starts(seen: Watched, name: str) -> list[tuple[Record, ProcessExec]]:
    """Return the program starts whose file name ends so, with their records."""
    pairs = zip(seen.records, seen.events(), strict=True)
    return [(r, e) for r, e in pairs if isinstance(e, ProcessExec) and e.filename.endswith(name)]


def program(seen: Watched, r: Record) -> KernelProgram:
    """Return what the kernel says of a record's program."""
    found = seen.kernel.program(r.program)
    assert found is not None
    return found


# ---- paths


def test_relative_paths_become_absolute_and_say_how(watch: Start, tmp_path: Path) -> None:
    """By cwd or by descriptor, found or not, behind links and mounts' ways: the kernel's path, or its directory's."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_text("x")
    (tmp_path / "link").symlink_to("deep/er")
    w = watch()
    w.python(
        """
import os, sys
os.chdir(sys.argv[1])
fd = os.open("deep", os.O_RDONLY | os.O_DIRECTORY)
os.open("link/file", os.O_RDONLY)
os.open("er/../er/file", os.O_RDONLY, dir_fd=fd)
for name, where in (("./missing-1", None), ("er/missing-2", fd), ("../../missing-3", fd)):
    try: os.open(name, os.O_RDONLY, dir_fd=where)
    except FileNotFoundError: pass
os.open("gone", os.O_CREAT | os.O_RDWR)
""",
        tmp_path,
    )
    seen = w.finish()
    file = f"{tmp_path}/deep/er/file"
    found = [e for _, e in opens(seen, "er/file")]
    assert [(file, "link/file"), (file, "er/../er/file")] == [(e.path, e.path_given) for e in found]
    stat = os.stat(file)
    for e in found:
        assert ("kernel_file", stat.st_ino) == (e.path_source, e.inode)
        assert f"{os.major(stat.st_dev)}:{os.minor(stat.st_dev)}" == e.device
    missing = [(e.path, e.path_given, e.path_source) for n in (1, 2, 3) for _, e in opens(seen, f"missing-{n}")]
    half = "kernel_directory_and_user_pointer"
    assert [
        (f"{tmp_path}/missing-1", "./missing-1", half),
        (f"{tmp_path}/deep/er/missing-2", "er/missing-2", half),
        (f"{tmp_path}/deep/../../missing-3", "../../missing-3", half),
    ] == missing


def test_the_kernels_path_can_be_asked_for_always(watch: Start, tmp_path: Path) -> None:
    """With `kernel_paths: always` an absolute path through a link says where it led; what was asked stands beside."""
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    w = watch(probes__kernel_paths="always")
    w.python("import os, sys; os.open(sys.argv[1] + '/link', os.O_RDONLY)", tmp_path)
    ((_, e),) = opens(w.finish(), "/real")
    assert (f"{tmp_path}/real", f"{tmp_path}/link", "kernel_file") == (e.path, e.path_given, e.path_source)


def test_a_lie_about_the_path_is_seen_through(watch: Start, tmp_path: Path) -> None:
    """A thread that rewrites the string during the call changes what was given, never what the kernel opened."""
    (tmp_path / "truth").write_text("x")
    w = watch(probes__kernel_paths="always")
    w.python(
        """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
truth, lie = os.fsencode(sys.argv[1]) + b"/truth", os.fsencode(sys.argv[1]) + b"/lies!"
text = ctypes.create_string_buffer(truth)
stop = False
def rewrite():
    while not stop:
        text.raw = lie + b"\\0"; text.raw = truth + b"\\0"
thread = threading.Thread(target=rewrite); thread.start()
for _ in range(300):
    fd = libc.open(text, os.O_RDONLY)
    if fd >= 0: os.close(fd)
stop = True; thread.join()
""",
        tmp_path,
    )
    seen = [e for e in w.finish().events(FileOpen) if e.path and str(tmp_path) in e.path and e.result >= 0]
    assert len(seen) > 10
    assert {f"{tmp_path}/truth"} == {e.path for e in seen}


def test_removed_and_nameless_files_say_so(watch: Start, tmp_path: Path) -> None:
    """A file without a name any more has its last path and a reason."""
    w = watch(probes__kernel_paths="always")
    w.python(
        """
import os, sys
path = sys.argv[1] + "/gone"
fd = os.open(path, os.O_CREAT | os.O_RDWR); os.unlink(path)
os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
memory = os.memfd_create("nameless")
os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
""",
        tmp_path,
    )
    seen = w.finish()
    again = [e for _, e in opens(seen, "/gone") if e.path_given]
    assert [(f"{tmp_path}/gone", "the file was removed")] == [(e.path, e.path_reason) for e in again]
    ((_, e),) = opens(seen, "memfd:nameless")
    assert ("memfd:nameless", "the file stands in no directory") == (e.path, e.path_reason)


def test_a_path_deeper_than_is_walked_keeps_the_callers_word(watch: Start, tmp_path: Path) -> None:
    """600 bytes of directories: what was given stays, with the reason why it is not absolute."""
    w = watch()
    w.python(
        """
import os, sys
os.chdir(sys.argv[1])
for _ in range(6):
    os.mkdir("d" * 100); os.chdir("d" * 100)
os.open("deep-file", os.O_CREAT | os.O_RDWR)
""",
        tmp_path,
    )
    ((_, e),) = opens(w.finish(), "deep-file")
    assert ("deep-file", "user_pointer_at_exit") == (e.path, e.path_source)
    assert "not known" in (e.path_reason or "") or "too long" in (e.path_reason or "")


# ---- processes and programs


def test_every_record_names_process_and_program(watch: Start, tmp_path: Path) -> None:
    """Start time as /proc has it; the program's real file behind a link; a fork has its own start, the same program."""
    (tmp_path / "renamed-python").symlink_to(os.path.realpath(sys.executable))
    w = watch()
    code = """
import os, sys
print(os.getpid(), open("/proc/self/stat").read().rpartition(")")[2].split()[19], flush=True)
open(sys.argv[1] + "/parent", "w")
if os.fork() == 0:
    open(sys.argv[1] + "/child", "w"); os._exit(0)
os.wait()
"""
    process = w.cgroup.run(tmp_path / "renamed-python", "-S", "-E", "-c", code, tmp_path, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=20)
    pid, ticks = map(int, out.split())
    seen = w.finish()
    ((parent, _),) = opens(seen, "/parent")
    ((child, _),) = opens(seen, "/child")
    assert (pid, ticks) == (parent.tgid, parent.start_ns * os.sysconf("SC_CLK_TCK") // 10**9)
    assert child.tgid != pid and child.start_ns > parent.start_ns
    assert parent.program == child.program
    real = os.stat(sys.executable)
    found = program(seen, parent)
    assert (os.path.realpath(sys.executable), real.st_ino, 0) == (found.path, found.inode, found.flags)


def test_an_exec_changes_the_program_and_not_the_process(watch: Start, tmp_path: Path) -> None:
    """The same pid and start, another program, from the exec's own record on; threads agree with their process."""
    w = watch()
    w.python(
        """
import os, sys, threading
def touch(name): open(sys.argv[1] + name, "w")
touch("/before")
thread = threading.Thread(target=touch, args=("/thread",)); thread.start(); thread.join()
os.execv("/bin/sh", ["sh", "-c", "read x < " + sys.argv[1] + "/before"])
""",
        tmp_path,
        check=False,
    )
    seen = w.finish()
    (before, _), (after, _) = opens(seen, "/before")
    ((thread, _),) = opens(seen, "/thread")
    ((exec_, _),) = [(r, e) for r, e in starts(seen, "/bin/sh") if e.argv[0] == "sh"]
    assert len({(r.tgid, r.start_ns) for r in (before, thread, exec_, after)}) == 1
    assert before.program == thread.program != exec_.program == after.program
    assert os.path.realpath("/bin/sh") == program(seen, after).path
    assert os.path.realpath(sys.executable) == program(seen, before).path


def test_a_script_runs_by_its_interpreter(watch: Start, tmp_path: Path) -> None:
    """`filename` is the script, made absolute; the program is what the kernel loaded for it, with inode and device."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    w = watch()
    w.python("import os, subprocess, sys; os.chdir(sys.argv[1]); subprocess.run(['./script'])", tmp_path)
    seen = w.finish()
    ((r, e),) = starts(seen, "/script")
    shell = os.stat("/bin/sh")
    assert (str(script), "./script", "/bin/sh") == (e.filename, e.filename_given, e.interpreter)
    assert (os.path.realpath("/bin/sh"), shell.st_ino) == (program(seen, r).path, e.inode)
    assert f"{os.major(shell.st_dev)}:{os.minor(shell.st_dev)}" == e.device


def test_the_parents_are_named_by_pid_and_start(watch: Start) -> None:
    """The parent first; each with the start that tells it from a later process of the same pid."""
    w = watch()
    out = w.python(
        """
import os, subprocess
def me(): return os.getpid(), int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
print(*me())
code = "import os, subprocess; print(os.getpid(), flush=True); subprocess.run(['/bin/true'])"
print(subprocess.run([__import__("sys").executable, "-S", "-c", code], capture_output=True).stdout.decode())
"""
    )
    outer, ticks, inner = map(int, out.split())
    ((_, e),) = starts(w.finish(), "/bin/true")
    assert e.ancestors is not None
    assert [inner, outer] == [a.pid for a in e.ancestors[:2]]
    assert inner == e.ppid
    assert ticks == e.ancestors[1].start_ns * os.sysconf("SC_CLK_TCK") // 10**9
    assert e.ancestors[0].start_ns > e.ancestors[1].start_ns


def test_a_program_in_memory_has_no_directory(watch: Start, tmp_path: Path) -> None:
    """What runs from a memfd, and what was removed while it runs, are named so and marked."""
    w = watch()
    w.python(
        """
import os, shutil, subprocess, sys
fd = os.memfd_create("hidden")
os.write(fd, open("/bin/cat", "rb").read())
subprocess.run([f"/proc/self/fd/{fd}", "/etc/hostname"], pass_fds=[fd], stdout=subprocess.DEVNULL)
gone = sys.argv[1] + "/gone"
shutil.copy("/bin/cat", gone)
cat = subprocess.Popen([gone, "-", "/etc/hostname"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
os.unlink(gone)
cat.communicate(b"")
""",
        tmp_path,
    )
    seen = w.finish()
    names = {program(seen, r).path: program(seen, r).flags for r, _ in opens(seen, "/etc/hostname")}
    assert {"/memfd:hidden", f"{tmp_path}/gone"} == set(names)
    assert names["/memfd:hidden"] & 4


def test_a_path_crosses_mounts_up_to_the_root_of_its_namespace(watch: Start, tmp_path: Path) -> None:
    """A program behind a bind mount in a mount namespace of its own has the path that the process itself sees."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "mounted").mkdir()
    (tmp_path / "bin" / "prog").write_bytes(Path("/bin/cat").read_bytes())
    (tmp_path / "bin" / "prog").chmod(0o755)
    w = watch()
    script = 'mount --bind "$0/bin" "$0/mounted" && exec "$0/mounted/prog" /etc/hostname'
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, tmp_path]
    w.cgroup.run(*unshare, stdout=subprocess.DEVNULL).wait(10)
    seen = w.finish()
    assert {f"{tmp_path}/mounted/prog"} == {program(seen, r).path for r, _ in opens(seen, "/etc/hostname")}


# ---- cgroups


def test_a_cgroup_keeps_its_name_after_its_end(watch: Start, cgroup: Cgroup) -> None:
    """A cgroup that lived for some milliseconds, and one that was there before, are named by the kernel."""
    name = f"docker-{'ab' * 32}.scope"
    w = watch()
    below = cgroup.path / name
    below.mkdir()
    script = f'echo $$ > "{below}/cgroup.procs" && cat /etc/hostname'
    cgroup.run("/bin/sh", "-c", script, stdout=subprocess.DEVNULL).wait(10)
    number = below.stat().st_ino
    below.rmdir()
    seen = w.finish()
    inside = [r for r, _ in opens(seen, "/etc/hostname")]
    assert {number} == {r.cgroup_id for r in inside}
    assert f"{cgroup.name}/{name}" == seen.kernel.cgroup(number)
    assert cgroup.name == seen.kernel.cgroup(cgroup.path.stat().st_ino)


def test_a_target_container_is_watched_from_its_first_event(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """The cgroup of a container that is a target is one from the moment it is made, long before anybody looks."""
    for runtime, name in (("docker", "{}"), ("systemd", "docker-{}.scope"), ("cri", "cri-containerd-{}.scope"),
                          ("crio", "crio-{}.scope"), ("podman", "libpod-{}")):  # fmt: skip
        identity = f"{abs(hash(runtime)) % 2**40:012x}".ljust(64, "a")
        w = watch(filters__target_containers=[identity[:12]])
        other = cgroup.path / name.format("f" * 64)
        ours = cgroup.path / name.format(identity)
        for where, mark in ((other, "other"), (ours, "ours")):
            (where / "nested").mkdir(parents=True)
            script = f'echo $$ > "{where}/nested/cgroup.procs" && exec cat "$0"'
            path = tmp_path / f"{runtime}-{mark}"
            path.touch()
            subprocess.run(["/bin/sh", "-c", script, path], check=True, timeout=10)
        seen = w.finish()
        assert [f"{tmp_path}/{runtime}-ours"] == [p for p in seen.paths() if p and p.startswith(str(tmp_path))]
        for where in (other, ours):
            (where / "nested").rmdir()
            where.rmdir()


def v1_cgroup(name: str) -> Path:
    """Return a new cgroup of the v1 pids controller; the test is skipped where there is none."""
    found = [h for h in targets.hierarchies() if h.flag]
    if not found:
        pytest.skip("this kernel has the pids controller in cgroup v2: there is no v1 fallback to test")
    path = found[0].root / f"stella-test-{os.getpid()}-{name}"
    path.mkdir()
    return path


def test_where_only_cgroup_v1_tells_it_is_asked(watch: Start, tmp_path: Path) -> None:
    """A process in the root of cgroup v2 has the cgroup of the v1 pids controller, as target and as name."""
    path = v1_cgroup("only")
    try:
        w = watch(filters__target_cgroups=[f"/{path.name}"])
        (tmp_path / "seen").touch()
        script = f'echo $$ > "{path}/cgroup.procs" && exec cat "$0"'
        subprocess.run(["/bin/sh", "-c", script, tmp_path / "seen"], check=True, timeout=10)
        subprocess.run(["cat", tmp_path / "seen"], check=True, timeout=10)
        seen = w.finish()
        ((r, _),) = opens(seen, "/seen")
        assert targets.CGROUP_V1 | path.stat().st_ino == r.cgroup_id
        assert f"/{path.name}" == seen.kernel.cgroup(r.cgroup_id)
    finally:
        for _ in range(50):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(0.1)


# ---- names for batches


def names_of(key: int, pid: int, start_ns: int) -> raw_batches.Names:
    """Return what a batch of one record of this program asks for."""
    packed = raw_batches.pack_batch(
        [record(1, 1, file_open(b"/x"), program=key, tgid=pid, start_ns=start_ns, cgroup=5)]
    )
    return raw_batches.names(packed)


def kernel_program(path: str, flags: int = 0) -> KernelProgram:
    """Return the program at a path as the kernel would tell it."""
    found = os.stat(path)
    return KernelProgram(path, os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino, flags)


def build_id_of(path: str) -> str:
    """Return a file's build-id by readelf."""
    notes = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True).stdout
    return notes.partition("Build ID: ")[2].split()[0]


async def test_a_build_id_is_read_from_the_running_file() -> None:
    """Through the process while it lives, else by its path when device and inode are the same; never another file's."""
    cat = os.path.realpath("/bin/cat")
    async with await anyio.open_process(["/bin/cat"], stdin=subprocess.PIPE) as process:
        start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        start_ns = start * 10**9 // os.sysconf("SC_CLK_TCK")
        asked = {cat: kernel_program(cat)}
        namer = Namer(lambda _: "/x", lambda _: asked[cat])
        names = names_of(99, process.pid, start_ns)
        await namer.settle(names)
        cgroups, programs = namer.names(names)
        assert {5: "/x"} == cgroups
        assert {99: Program(cat, programs[99].device, os.stat(cat).st_ino, build_id_of(cat))} == programs
        shifted = Question(1, kernel_program(cat), process.pid, start_ns + 10**10)
        assert (build_id_of(cat), "") == read_build_id(shifted), "another process by now: the path still leads there"
        wrong = KernelProgram(cat, 1, 1, 0)
        assert ("", "program_gone") == read_build_id(Question(1, wrong, process.pid, start_ns + 10**10))
        process.kill()
    assert (build_id_of(cat), "") == read_build_id(Question(1, kernel_program(cat), process.pid, start_ns))


async def test_what_hangs_holds_no_batch_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a program's file does not answer, the batch goes on after some milliseconds, and the next ones at once."""
    cat = kernel_program(os.path.realpath("/bin/cat"))
    namer = Namer(lambda _: None, lambda _: cat, settle_seconds=0.05)
    hangs = threading.Event()
    monkeypatch.setattr(naming, "read_build_id", lambda _: ("", "program_gone") if hangs.wait(20) else ("", "never"))
    begun = time.monotonic()
    for key in range(100, 120):
        names = names_of(key, 1, 1)
        await namer.settle(names)
        assert "build_id_pending" == namer.names(names)[1][key].reason
    assert time.monotonic() - begun < 0.5
    assert 20 == namer.missing["build_id_pending"]
    hangs.set()


async def test_a_program_that_is_gone_is_not_asked_about_with_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second at the most; the first batch waits for the answer, later ones do not; one that comes is taken."""
    asked: list[int] = []
    answers = iter([("", "program_gone"), ("ab" * 20, "")])

    def read(question: Question) -> tuple[str, str]:
        asked.append(question.key)
        return next(answers)

    monkeypatch.setattr(naming, "read_build_id", read)
    monkeypatch.setattr(naming, "AGAIN_SECONDS", 0.2)
    namer = Namer(lambda _: None, lambda _: kernel_program("/bin/cat"), settle_seconds=5)
    names = names_of(99, 1, 1)
    for _ in range(20):
        await namer.settle(names)
        assert "program_gone" == namer.names(names)[1][99].reason
    assert [99] == asked
    with anyio.fail_after(5):
        while namer.names(names)[1][99].reason:
            await anyio.sleep(0.02)
            await namer.settle(names)
    assert ([99, 99], "ab" * 20) == (asked, namer.names(names)[1][99].build_id)


async def test_numbers_without_a_name_say_why() -> None:
    """Threads of the kernel, and what the kernel's map has forgotten, have reasons; nobody named is not asked about."""
    namer = Namer(lambda _: None, lambda _: None)
    for key, reason in ((1, "kernel_thread"), (2, "no_memory_in_kernel"), (12345, "forgotten")):
        names = names_of(key, 1, 1)
        await namer.settle(names)
        assert ({}, {key: Program("", reason=reason)}) == namer.names(names)
    assert ({}, {}) == namer.names(names_of(0, 0, 0))


# ---- stacks


def caller(folder: Path) -> Path:
    """Compile a program with frame pointers that opens, connects and starts, each in a function of its own."""
    source = folder / "caller.c"
    source.write_text(
        """
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#define OWN __attribute__((noinline, noclone))
OWN long opens(const char *path) { long r; __asm__ volatile("syscall" : "=a"(r) : "a"(2), "D"(path), "S"(O_RDONLY)
    : "rcx", "r11", "memory"); return r + 1; }
OWN long connects(int fd, void *at) { long r; __asm__ volatile("syscall" : "=a"(r) : "a"(42), "D"(fd), "S"(at), "d"(110)
    : "rcx", "r11", "memory"); return r + 1; }
OWN long starts(char **argv) { long r; __asm__ volatile("syscall" : "=a"(r) : "a"(59), "D"(argv[0]), "S"(argv), "d"(0)
    : "rcx", "r11", "memory"); return r + 1; }
OWN long all(const char *path, char **argv) {
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    return opens(path) + connects(socket(AF_UNIX, SOCK_STREAM, 0), &at) + starts(argv);
}
int main(int argc, char **argv) { return all(argv[1], argv + 2); }
"""
    )
    program = folder / "caller"
    subprocess.run(["gcc", "-O0", "-fno-omit-frame-pointer", "-o", program, source], check=True)
    return program


def function_at(program: Path, offset: int) -> str:
    """Return the function of an offset of a position-independent program, by nm."""
    rows = subprocess.run(["nm", "-n", program], capture_output=True, text=True, check=True).stdout.splitlines()
    places = [(int(row.split()[0], 16), row.split()[2]) for row in rows if row.split()[1] in "tT"]
    return max(place for place in places if place[0] <= offset)[1]


def test_opens_connects_and_starts_say_which_code_called(watch: Start, tmp_path: Path) -> None:
    """With `probes.stacks` each event has the caller's frames as build-id and offset; without it none has."""
    if os.uname().machine != "x86_64":
        pytest.skip("the program makes its system calls by x86-64's instructions")
    program = caller(tmp_path)
    (tmp_path / "file").touch()
    for stacks in ([], ["file_open", "process_exec", "net_connect"]):
        w = watch(probes__stacks=stacks)
        w.cgroup.run(program, tmp_path / "file", "/bin/true").wait(10)
        seen = w.finish()
        ((_, opened),) = opens(seen, f"{tmp_path}/file")
        ((_, started),) = starts(seen, "/bin/true")
        (connected,) = [e for e in seen.events(events.NetConnect) if e.family == "unix" and e.result < 0]
        for event, name in ((opened, "opens"), (connected, "connects"), (started, "starts")):
            if not stacks:
                assert event.stack is None
                continue
            assert event.stack is not None
            assert {build_id_of(str(program))} == {frame.build_id for frame in event.stack[:3]}, (name, event.stack)
            assert [name, "all", "main"] == [function_at(program, frame.offset) for frame in event.stack[:3]]


def test_remembered_names_stay_within_both_bounds() -> None:
    """The name that was not used for longest goes first; a name that is replaced is not counted twice."""
    kept: Remembered[str] = Remembered(len, 10 * (250 + 100))
    for i in range(50):
        kept.put(i, "x" * 100)
        kept.put(i, "y" * 100)
        assert kept.get(0)
        assert kept.stats()["bytes"] == 350 * kept.stats()["entries"] <= kept.stats()["max_bytes"]
    assert "y" * 100 == kept.get(49)
    assert kept.get(1) is None
    many: Remembered[str] = Remembered(len, 1 << 30)
    for i in range(REMEMBERED_MAX + 10):
        many.put(i, "")
    assert REMEMBERED_MAX == many.stats()["entries"]
