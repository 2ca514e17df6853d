"""TLS probes beyond the node's own libssl: container-private copies, layers that containers share, static programs."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stella_shared.events import SslOp
from tests.collector.conftest import Watch
from tests.collector.functions_kit import compiled, heeding, wait_for

pytestmark = pytest.mark.kernel
Start = Callable[..., Watch]

#: What a TLS library exports, as far as the probes go.
TLS = """
__attribute__((noinline)) int SSL_write(void *s, const void *b, int n) { __asm__ volatile(""); return n; }
__attribute__((noinline)) int SSL_read(void *s, void *b, int n) { __asm__ volatile(""); return n / 2; }
"""
#: Opens the library it is told, waits for a line, then writes 10 bytes and reads 4, argv[2] times.
USER = """
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv)
{
	void *library = dlopen(argv[1], RTLD_NOW);
	int (*put)(void *, const void *, int) = (int (*)(void *, const void *, int))dlsym(library, "SSL_write");
	int (*get)(void *, void *, int) = (int (*)(void *, void *, int))dlsym(library, "SSL_read");
	char buffer[16];
	getchar();
	for (int i = 0; i < atoi(argv[2]); i++) {
		put(0, buffer, 10);
		get(0, buffer, 8);
	}
	return 0;
}
"""


def attached(watch: Watch) -> bool:
    """Return whether some file's SSL_write has its probes."""
    return any(state.mode == "openssl_write" and state.functions for state in watch.kernel.binaries.states())


def has_own_probes(watch: Watch, pid: int) -> bool:
    """Return whether a process has probes that are attached to it alone."""
    return any(watch.kernel.binaries._probes._of_process.get(pid, ({}, ""))[0].values())


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Let a program that waits go on to its end."""
    process.communicate(b"go\n", timeout=20)
    assert 0 == process.returncode


#: The other probes take the kernel long to detach.
TLS_ALONE = {
    f"probes__{name}": False
    for name in ("sys_enter_openat", "sched_process_exec", "inet_sock_set_state", "libc_connect", "libc_accept")
}


def moved(watch: Watch) -> list[tuple[str, str, int]]:
    """Return (library, direction, bytes) of each operation."""
    return [(op.library, op.direction, op.bytes) for op in watch.finish().events(SslOp)]


def test_the_nodes_own_library_is_attached_process_by_process(watch: Start, tmp_path: Path) -> None:
    """A library that everybody may use costs the targets' processes alone; each is met when it maps the file."""
    library = compiled(tmp_path, "libssl.so.3", TLS, "-shared", "-fPIC")
    program = compiled(tmp_path, "user", USER)
    w = watch(**TLS_ALONE)
    with heeding(w):
        for _ in range(2):
            process = w.cgroup.run(program, library, "3", stdin=subprocess.PIPE)
            wait_for(lambda pid=process.pid: has_own_probes(w, pid))
            let_go(process)
        # Not in the target cgroup: nobody attaches to it.
        subprocess.run([program, library, "3"], check=True, timeout=20, input=b"go\n")
    assert {(str(library), "read", 4): 6, (str(library), "write", 10): 6} == Counter(moved(w))
    states = {state.name: (state.attached, state.scope) for state in w.kernel.states}
    assert (True, "process") == states["openssl_read"] == states["openssl_write"]


def test_a_forked_worker_gets_probes_of_its_own(watch: Start, tmp_path: Path) -> None:
    """A fork maps nothing anew, so no notice tells of it: it is found by the next look, a quarter of a second later."""
    library = compiled(tmp_path, "libssl.so.3", TLS, "-shared", "-fPIC")
    source = USER.replace("#include <stdlib.h>", "#include <stdlib.h>\n#include <sys/wait.h>\n#include <unistd.h>")
    fork = "if (fork()) { wait(0); return 0; } getchar();"
    source = source.replace("getchar();", f"getchar(); {fork}")
    program = compiled(tmp_path, "forking", source)
    w = watch(**TLS_ALONE)
    with heeding(w):
        process = w.cgroup.run(program, library, "3", stdin=subprocess.PIPE, bufsize=0)
        wait_for(lambda: has_own_probes(w, process.pid))
        assert process.stdin
        process.stdin.write(b"x")

        def worker() -> int:
            pids = (w.cgroup.path / "cgroup.procs").read_text().split()
            return next((int(pid) for pid in pids if int(pid) != process.pid), 0)

        wait_for(lambda: worker() != 0)
        w.kernel.binaries.recheck()
        assert has_own_probes(w, worker())
        let_go(process)
    assert {(str(library), "read", 4): 3, (str(library), "write", 10): 3} == Counter(moved(w))


def test_a_layer_that_two_containers_share_is_probed_once(watch: Start, tmp_path: Path) -> None:
    """Two overlays over one layer are one inode below: each call shows once, in both containers."""
    lower = tmp_path / "lower"
    lower.mkdir()
    compiled(lower, "libssl.so.3", TLS, "-shared", "-fPIC")
    compiled(lower, "user", USER, "-static-libgcc")
    w = watch(**TLS_ALONE)
    script = 'mount -t tmpfs none "$1" && mkdir "$1/u" "$1/w" "$1/m" && mount -t overlay overlay -o ' \
        'lowerdir="$2",upperdir="$1/u",workdir="$1/w" "$1/m" && exec "$1/m/user" "$1/m/libssl.so.3" 4'  # fmt: skip
    with heeding(w):
        running = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            command = ["unshare", "-m", "sh", "-c", script, "sh", tmp_path / name, lower]
            running.append(w.cgroup.run(*command, stdin=subprocess.PIPE))
        wait_for(lambda: attached(w))
        time.sleep(0.3)  # had the second one been attached by itself, it would be by now
        for process in running:
            let_go(process)
        files = [state for state in w.kernel.binaries.states() if state.mode == "openssl_write"]
    found = moved(w)
    assert 1 == len(files)
    assert 16 == len(found)
    assert {("read", 4), ("write", 10)} == {(direction, count) for _, direction, count in found}


def test_a_copy_of_a_containers_own_is_found(watch: Start, tmp_path: Path) -> None:
    """A library that exists in one mount namespace only is attached through the process that has it mapped."""
    compiled(tmp_path, "libssl.so.3", TLS, "-shared", "-fPIC")
    program = compiled(tmp_path, "user", USER)
    place = tmp_path / "private"
    place.mkdir()
    w = watch(**TLS_ALONE)
    script = 'mount -t tmpfs none "$1" && cp "$2" "$1/libssl.so.1.1" && exec "$3" "$1/libssl.so.1.1" 5'
    with heeding(w):
        command = ["unshare", "-m", "sh", "-c", script, "sh", place, tmp_path / "libssl.so.3", program]
        process = w.cgroup.run(*command, stdin=subprocess.PIPE)
        wait_for(lambda: attached(w))
        let_go(process)
    assert not os.listdir(place)
    assert 10 == len(moved(w))


@pytest.mark.parametrize("options", [["-static"], ["-static-pie"], []], ids=["static", "static-pie", "dynamic"])
def test_a_program_with_the_library_inside_is_watched(watch: Start, tmp_path: Path, options: list[str]) -> None:
    """SSL_read and SSL_write of the program's own table are enough; which file it was is said."""
    source = TLS + """
#include <stdio.h>
int main(void)
{
	char buffer[16];
	getchar();
	for (int i = 0; i < 6; i++) {
		SSL_write(0, buffer, 10);
		SSL_read(0, buffer, 8);
	}
	return 0;
}
"""  # fmt: skip
    program = compiled(tmp_path, "server", source, *options)
    w = watch(**TLS_ALONE)
    with heeding(w):
        process = w.cgroup.run(program, stdin=subprocess.PIPE)
        wait_for(lambda: attached(w))
        let_go(process)
        # Now that it was met, a process of any length is seen whole.
        assert 0 == w.cgroup.run(program, stdin=subprocess.DEVNULL).wait(timeout=20)
    found = moved(w)
    assert {(str(program), "read", 4), (str(program), "write", 10)} == set(found)
    assert 24 == len(found)
    assert w.kernel.binaries.states()


def test_the_way_from_exec_to_attached_is_short(watch: Start, tmp_path: Path) -> None:
    """A new program's probes stand some milliseconds after its exec, the reading of its symbols included."""
    source = TLS + "#include <unistd.h>\nint main(void) { usleep(400000); return 0; }\n"
    w = watch(**TLS_ALONE)
    with heeding(w):
        for index in range(5):
            program = compiled(tmp_path, f"server{index}", source.replace("400000", f"40000{index}"))
            assert 0 == w.cgroup.run(program).wait(timeout=20)
            time.sleep(0.05)
    delays = w.kernel.binaries.delays_us
    assert len(delays) >= 5
    assert sorted(delays)[len(delays) // 2] < 500_000, "some 20 ms on an idle machine"
