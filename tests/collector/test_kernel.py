"""The probes on the real kernel, watching one cgroup of the test's own: what is recorded, filtered and lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stella_collector import ring
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_collector.probe_cost import WORK
from stella_collector.targets import hierarchies
from stella_shared import raw_batches
from stella_shared.events import FileOpen, NetConnect, ProcessExec, TcpState
from tests.collector.conftest import Watch, signals_of
from tests.system.node import Cgroup, build_generator

pytestmark = pytest.mark.kernel
Start = Callable[..., Watch]

#: Without the dynamic linker's and Python's own opens: those of the code's own making.
OPEN_ALL = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        pass
"""


def opened(watch: Watch, paths: list[str | Path], **keys: object) -> set[str]:
    """Return which of these paths show in the evidence when a process opens all of them."""
    watch.python(OPEN_ALL, *paths)
    return {str(path) for path in watch.finish().paths()} & {str(path) for path in paths}


# ---- what is recorded


def test_every_way_to_open_is_recorded_with_its_outcome(watch: Start, tmp_path: Path) -> None:
    """open, openat and openat2 give descriptor or -errno, flags, mode, resolve and the directory they start from."""
    (tmp_path / "there").touch()
    w = watch()
    w.python(
        """
import ctypes, os, platform, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
folder = sys.argv[1].encode()
fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
if platform.machine() == "x86_64":
    libc.syscall(2, folder + b"/there", os.O_RDWR, 0)
    libc.syscall(2, folder + b"/absent-open", os.O_RDONLY, 0)
libc.syscall(257 if platform.machine() == "x86_64" else 56, fd, b"made", os.O_CREAT | os.O_WRONLY, 0o640)
os.open(folder + b"/there", os.O_PATH)
how = struct.pack("<QQQ", os.O_RDONLY, 0, 0x04)
libc.syscall(437, fd, b"there", how, len(how))
libc.syscall(437, fd, b"../absent", struct.pack("<QQQ", 0, 0, 0x08), 24)
libc.syscall(257 if platform.machine() == "x86_64" else 56, -100, ctypes.c_void_p(8), 0, 0)
""",
        tmp_path,
    )
    seen = w.finish()
    mine = [e for e in seen.events(FileOpen) if e.path is None or str(tmp_path) in e.path or e.dfd not in (None, -100)]
    by_path = {(e.path, e.access): e for e in mine}
    if os.uname().machine == "x86_64":
        assert by_path[f"{tmp_path}/there", "read_write"].result >= 0
        assert -errno.ENOENT == by_path[f"{tmp_path}/absent-open", "read"].result
    made = by_path[f"{tmp_path}/made", "write"]
    assert ("made", "kernel_file") == (made.path_given, made.path_source)
    assert made.result >= 0
    assert 0o640 == made.mode
    assert made.dfd is not None and made.dfd >= 3
    assert by_path[f"{tmp_path}/there", "path"].result >= 0
    there, absent = by_path[f"{tmp_path}/there", "read"], by_path[f"{tmp_path}/../absent", "read"]
    assert (0x04, True) == (there.resolve, there.result >= 0)
    assert (0x08, -errno.EXDEV) == (absent.resolve, absent.result)
    unreadable = by_path[None, "read"]
    assert (-errno.EFAULT, "the address could not be read") == (unreadable.result, unreadable.path_reason)


def test_a_path_on_a_cold_page_is_read(watch: Start, tmp_path: Path) -> None:
    """A path whose page was never touched by the program is there by the time it is recorded."""
    holder = tmp_path / "strings"
    target = tmp_path / "cold-target"
    target.touch()
    holder.write_bytes(b"\0" * 8192 + os.fsencode(target) + b"\0" * 4096)
    w = watch()
    w.python(
        """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDONLY)
at = libc.mmap(None, 12288, 1, 2, fd, 0)
libc.madvise(ctypes.c_void_p(at), 12288, 4)
libc.open.argtypes = [ctypes.c_void_p, ctypes.c_int]
assert libc.open(at + 8192, 0) >= 0
""",
        holder,
    )
    assert [str(target)] == [p for p in w.finish().paths() if p and "cold-target" in p]


def test_long_arguments_are_cut_and_marked(watch: Start) -> None:
    """100 KB of arguments: the first 2,048 bytes are kept, the true length is told."""
    w = watch()
    w.python("import subprocess, sys; subprocess.run(['/bin/true', 'a' * 50_000, 'b' * 50_000])")
    (ran,) = [e for e in w.finish().events(ProcessExec) if e.filename == "/bin/true"]
    assert (True, 100_000 + len("/bin/true") + 3) == (ran.argv_truncated, ran.argv_bytes)
    assert ["/bin/true", "a" * (2048 - len("/bin/true") - 1)] == ran.argv


def test_a_script_names_its_interpreter(watch: Start, tmp_path: Path) -> None:
    """The file that was asked for and what runs it are both there; the parent is known."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh -e\nexit 0\n")
    script.chmod(0o755)
    w = watch()
    parent = int(
        w.python("import os, subprocess, sys; print(os.getpid()); subprocess.run([sys.argv[1], 'x y'])", script)
    )
    (ran,) = [e for e in w.finish().events(ProcessExec) if e.filename == str(script)]
    assert ("/bin/sh", parent, ["/bin/sh", "-e", str(script), "x y"]) == (ran.interpreter, ran.ppid, ran.argv)


def test_unix_sockets_have_names(watch: Start, tmp_path: Path) -> None:
    """A path and an abstract name are told apart; both sides name the socket that was connected to."""
    w = watch()
    w.python(
        """
import socket, sys
for name in (sys.argv[1], "\\0stella-abstract"):
    s = socket.socket(socket.AF_UNIX); s.bind(name); s.listen()
    c = socket.socket(socket.AF_UNIX); c.connect(name); s.accept()
    d = socket.socket(socket.AF_UNIX); d.bind("\\0stella-caller"); d.connect(name); s.accept(); d.close()
""",
        tmp_path / "s",
    )
    unix = [e for e in w.finish().events(NetConnect) if e.family == "unix"]
    connects = [(e.address, e.abstract, e.result) for e in unix if e.direction == "connect"]
    assert [(str(tmp_path / "s"), False, 0)] * 2 + [("@stella-abstract", True, 0)] * 2 == connects
    accepts = [(e.address, e.abstract, e.address_reason) for e in unix if e.direction == "accept"]
    assert [(str(tmp_path / "s"), False, None)] * 2 + [("@stella-abstract", True, None)] * 2 == accepts


def test_refused_connections_and_accepts_say_so(watch: Start) -> None:
    """A refused connect carries its peer and -errno; an accept that found nobody carries -errno and a reason."""
    w = watch()
    port = int(
        w.python(
            """
import socket
s = socket.create_server(("127.0.0.1", 0)); port = s.getsockname()[1]
s.setblocking(False)
try: s.accept()
except BlockingIOError: pass
s.close()
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    try: socket.socket(family).connect((address, port))
    except ConnectionRefusedError: pass
try: socket.socket(socket.AF_INET).accept()
except OSError: pass
print(port)
"""
        )
    )
    seen = w.finish().events(NetConnect)
    refused = [(e.address, e.port, e.result) for e in seen if e.direction == "connect"]
    assert [("127.0.0.1", port, -errno.ECONNREFUSED), ("::1", port, -errno.ECONNREFUSED)] == refused
    nobody = [(e.address_reason, e.result) for e in seen if e.direction == "accept"]
    assert [("no connection was taken", -errno.EAGAIN), ("no connection was taken", -errno.EINVAL)] == nobody


# ---- filters


def test_only_the_target_cgroup_and_what_lies_below_is_watched(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """A nested child cgroup belongs to its target; a sibling does not, and is counted as filtered."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    deep = cgroup.path / "a" / "b"
    deep.mkdir(parents=True)
    sibling = Cgroup("sibling")
    enter = """
import os, sys
with open(sys.argv.pop(1) + "/cgroup.procs", "w") as f:
    f.write(str(os.getpid()))
"""
    try:
        w = watch()
        w.python(enter + OPEN_ALL, deep, inside)
        w.cgroup = sibling
        w.python(OPEN_ALL, outside)
        w.cgroup = cgroup
        seen = w.finish()
    finally:
        sibling.remove()
        deep.rmdir()
        deep.parent.rmdir()
    assert str(inside) in seen.paths()
    assert str(outside) not in seen.paths()
    assert seen.ledger.filtered["kernel_target"] > 0
    level = {r.cgroup_id for r in seen.records}
    assert len(level) >= 2, "the child's own cgroup id is in its records"


@pytest.mark.parametrize("kind", ["mnt", "net", "pid"])
def test_a_namespace_can_be_the_target(watch: Start, cgroup: Cgroup, tmp_path: Path, kind: str) -> None:
    """Processes in a target namespace are watched wherever they live; the rest of the machine is not."""
    flag = {"mnt": "--mount", "net": "--net", "pid": "--pid"}[kind]
    fork = ["--fork"] if kind == "pid" else []
    waiting = """
import os, sys
print(os.readlink("/proc/self/ns/" + sys.argv.pop(1)), flush=True)
sys.stdin.readline()
"""
    process = cgroup.run(
        "unshare", flag, *fork, sys.executable, "-S", "-E", "-c", waiting + OPEN_ALL, kind, tmp_path / "inside",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    namespace = process.stdout.readline().decode().strip()
    assert namespace.startswith(f"{kind}:[")
    w = watch(filters__target_namespaces=[namespace])
    w.python(OPEN_ALL, tmp_path / "outside")
    process.communicate(b"go\n", timeout=10)
    paths = w.finish().paths()
    assert str(tmp_path / "inside") in paths
    assert str(tmp_path / "outside") not in paths


def test_path_lists_decide_in_the_kernel(watch: Start, tmp_path: Path) -> None:
    """Deny wins over allow; what neither list names is dropped; each drop is counted."""
    (tmp_path / "allowed" / "secret").mkdir(parents=True)
    paths: list[str | Path] = [
        tmp_path / "allowed" / "a", tmp_path / "allowed" / "secret" / "b", tmp_path / "other", tmp_path / "allowed",
    ]  # fmt: skip
    w = watch(
        filters__paths__allowlist=[f"{tmp_path}/allowed/**"], filters__paths__denylist=[f"{tmp_path}/allowed/secret/**"]
    )
    w.python(OPEN_ALL, *paths)
    seen = w.finish()
    assert [str(paths[0])] == [p for p in seen.paths() if p.startswith(str(tmp_path))]
    assert seen.ledger.filtered["kernel_path"] >= 3


def test_a_dressed_up_path_does_not_hide(watch: Start, tmp_path: Path) -> None:
    """A path that only looks denied, or only looks not allowed, is left to user space, which sees through it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "x").touch()
    dressed = [
        f"/proc/..{tmp_path}/etc/x", f"/{tmp_path}/etc/x", f"{tmp_path}//etc/x", f"{tmp_path}/./etc/x",
        f"{tmp_path}/etc/../etc/x", f"{tmp_path}/etc/../relative-x",
    ]  # fmt: skip
    keys = {"filters__paths__allowlist": [f"{tmp_path}/etc/**"], "filters__paths__denylist": ["/proc/**"]}
    assert set(dressed) == opened(watch(**keys), [*dressed, "/proc/self/status", f"{tmp_path}/x"])


@pytest.mark.parametrize(
    ("deny", "allow", "expected"),
    [
        pytest.param(["127.0.0.0/8"], [], {"::1"}, id="v4 denied"),
        pytest.param(["::1"], [], {"127.0.0.1", "127.9.9.9"}, id="v6 denied"),
        pytest.param(["127.9.0.0/16"], [], {"127.0.0.1", "::1"}, id="part of v4 denied"),
        pytest.param([], ["127.0.0.0/9"], {"127.0.0.1", "127.9.9.9"}, id="v4 allowed"),
        pytest.param(["127.9.0.0/16"], ["127.0.0.0/8"], {"127.0.0.1"}, id="deny wins"),
    ],
)
def test_network_lists_decide_in_the_kernel(
    watch: Start, deny: list[str], allow: list[str], expected: set[str]
) -> None:
    """Connections, accepts and TCP states with a denied peer are dropped and counted, for IPv4 and IPv6."""
    w = watch(filters__networks__denylist=deny, filters__networks__allowlist=allow)
    w.python(
        """
import socket
for family, address in ((2, "127.0.0.1"), (2, "127.9.9.9"), (10, "::1")):
    s = socket.create_server((address, 0), family=family)
    with socket.socket(family) as c:
        c.bind((address, 0)); c.connect(s.getsockname()); s.accept()[0].close()
    s.close()
"""
    )
    seen = w.finish()
    for direction in ("connect", "accept"):
        assert expected == {e.address for e in seen.events(NetConnect) if e.direction == direction}
    states = {e.destination_address for e in seen.events(TcpState) if e.new_state != "LISTEN"}
    assert expected == states - {"0.0.0.0", "::"}
    assert seen.ledger.filtered["kernel_network"] >= 2


# ---- losses


def test_the_rate_limit_loses_by_number(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """Beyond the limit each event still takes its number: recorded and lost add up to what was made."""
    w = watch(max_events_per_second=1000, filters__paths__allowlist=[f"{tmp_path}/**"])
    made = generate(w, tmp_path, 4000, rate=0)
    seen = w.finish()
    opens = len(seen.paths())
    assert {"rate_limit"} == set(seen.ledger.lost)
    assert made == opens + seen.ledger.lost["rate_limit"]
    assert 0 < opens <= 1000


def test_a_full_ring_loses_by_number(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """A ring that nobody drains takes what it holds; every other event is a number that is lost."""
    w = watch(ring_buffer_size=os.sysconf("SC_PAGESIZE"), filters__paths__allowlist=[f"{tmp_path}/work/**"])
    made = generate(w, tmp_path, 3000, rate=0)
    seen = w.finish()
    assert {"ring_full": made - len(seen.records)} == {c: n for c, n in seen.ledger.lost.items() if c == "ring_full"}
    assert 0 < len(seen.paths()) < 60


def test_draining_while_events_come_keeps_the_books(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """Counters are read while programs run, and the small ring overflows now and then: nothing is told twice."""
    w = watch(ring_buffer_size=1 << 16, filters__paths__allowlist=[f"{tmp_path}/**"])
    made = generate(w, tmp_path, 60_000, rate=0, drain=True)
    seen = w.finish()
    assert made == len(seen.paths()) + sum(seen.ledger.lost.values())
    assert len(w.ledgers) > 20


def generate(w: Watch, folder: Path, count: int, *, rate: int, drain: bool = False) -> int:
    """Run the generator in the cgroup; return how many opens of `folder` and execs inside it there were."""
    program = build_generator(folder.parent)
    work = folder / "work"
    work.mkdir()
    # Only what is made under `folder` passes the path filter; the shell's and the program's execs pass too.
    w.kernel.detach()
    process = w.cgroup.run(program, work, str(count), str(rate), "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdout.readline()
    w.kernel.attach()
    process.stdin.write(b"x")
    process.stdin.flush()
    if drain:
        while process.poll() is None:
            w.drain()
            time.sleep(0.0005)
    process.communicate(timeout=30)
    return count


# ---- both readers


def test_both_readers_bring_the_same(cgroup: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libbpf's own reader gives the C reader's records, in small bites too, and keeps the same books."""
    signals = signals_of(filters__target_cgroups=[cgroup.name], filters__paths__allowlist=[f"{tmp_path}/**"])
    first = Watch(signals, cgroup)
    monkeypatch.setattr(ring, "NATIVE", tmp_path)
    second = Watch(signals, cgroup)
    try:
        assert (ring.CRing, ring.LibbpfRing) == (type(first.kernel.ring), type(second.kernel.ring))
        for w in (first, second):
            w.kernel.detach()
        second.kernel.attach()
        first.kernel.attach()
        first.python(OPEN_ALL, *(tmp_path / ("x" * i) for i in range(1, 200)))
        for w in (first, second):
            w.kernel.detach()
        bites = []
        while not bites or second.kernel.ring.waiting():
            bites.append(second.kernel.ring.drain(3 * ring.RECORD_MAX_BYTES))
            assert len(bites[-1].records) <= 3 * ring.RECORD_MAX_BYTES
            assert bites[-1].left == second.kernel.ring.waiting()
        assert len(bites) > 1
        whole = first.kernel.ring.drain(1 << 20)

        mine = os.fsencode(tmp_path / "x")

        def opens(*drains: ring.Drained) -> list[tuple[int, bytes]]:
            rows = [r for drained in drains for r in raw_batches.records(drained.records)]
            return [(r.call, r.body) for r in rows if r.type == 1 and mine in r.body]

        assert 199 == len(opens(whole))
        assert opens(whole) == opens(*bites)
        assert first.kernel.ring.seen() == second.kernel.ring.seen()
    finally:
        first.kernel.close()
        second.kernel.close()


# ---- what cannot attach


def test_a_probe_that_fails_does_not_stop_the_others(cgroup: Cgroup, tmp_path: Path) -> None:
    """A library that is no library leaves the TLS probes unattached with a reason; the rest is attached."""
    (tmp_path / "libssl-fake.so").write_bytes(b"no ELF")
    signals = signals_of(
        filters__target_cgroups=[cgroup.name], probes__openssl_libraries=[str(tmp_path / "libssl-fake.so")]
    )
    with Kernel(signals, Libbpf(), watch_nothing=True) as kernel:
        kernel.attach()
        kernel.attach_libraries_of_node()
        states = {state.name: state for state in kernel.states}
    for name in ("openssl_read", "openssl_write"):
        assert not states[name].attached
        assert states[name].reason
    assert all(s.attached for name, s in states.items() if not name.startswith("openssl")), states


def test_a_switched_off_probe_says_so(watch: Start, tmp_path: Path) -> None:
    """Each probe has its key; what is off is neither loaded nor silent about it."""
    w = watch(probes__sys_enter_openat=False, probes__libc_accept=False)
    w.python(OPEN_ALL, tmp_path)
    states = {s.name: (s.wanted, s.attached, s.reason) for s in w.kernel.states}
    assert (False, False, "switched off in the configuration") == states["sys_enter_openat"]
    assert (True, True, "") == states["sched_process_exec"]
    seen = w.finish()
    assert [] == seen.events(FileOpen)
    assert seen.events(ProcessExec)


def test_without_privilege_every_probe_names_what_is_missing(tmp_path: Path) -> None:
    """Without capabilities, `--test-probes` attaches nothing, names the capability for each probe, and ends with 3."""
    config = tmp_path / "stellaops.yaml"
    config.write_text("signals: {}\n")
    command = [sys.executable, "-m", "stella_collector", "--test-probes", "--config", str(config)]
    # Another uid may not even reach the interpreter; without capabilities root is nobody to the kernel.
    done = subprocess.run(
        ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert 3 == done.returncode, done.stderr
    rows = json.loads(done.stdout)
    assert 7 == len(rows)
    for row in rows:
        assert not row["attached"]
        assert not row["permission"], row
        assert "CAP_BPF" in row["fix"]


def test_with_privilege_the_probes_can_be_tried(tmp_path: Path) -> None:
    """As root, `--test-probes` attaches each probe for a moment and says where."""
    config = tmp_path / "stellaops.yaml"
    config.write_text("signals: {}\n")
    command = [sys.executable, "-m", "stella_collector", "--test-probes", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    rows = {row["probe"]: row for row in json.loads(done.stdout)}
    assert all(row["attached"] for row in rows.values())
    assert "syscalls/sys_exit_openat2" in rows["sys_enter_openat"]["attach_point"]


def test_the_cost_of_a_probe_is_measured_on_a_workload_of_its_own(tmp_path: Path) -> None:
    """Each probe has kernel nanoseconds an event, between what a call takes at the least and a millisecond."""
    config = tmp_path / "stellaops.yaml"
    config.write_text("signals: {filters: {paths: {allowlist: [/nowhere/**]}}}\n")
    command = [sys.executable, "-m", "stella_collector", "--test-probes", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as collector:
        said, _ = collector.communicate(timeout=60)
    rows = {row["probe"]: row for row in json.loads(said)}
    for name, (_, count, bursts) in WORK.items():
        assert rows[name]["cost_events"] >= count * bursts, rows[name]
        assert 20 < rows[name]["cost_ns"] < 1_000_000, rows[name]
    assert not (hierarchies()[0].root / f"stella-test-probes-{collector.pid}").exists()


def test_a_tcp_connection_is_seen_from_both_ends(watch: Start) -> None:
    """States of a whole connection, IPv6 too; who is named is the process that owns the socket."""
    w = watch()
    pid = int(
        w.python(
            """
import os, socket
print(os.getpid())
for family, address in ((2, "127.0.0.1"), (10, "::1")):
    s = socket.create_server((address, 0), family=family)
    c = socket.create_connection(s.getsockname()[:2]); a = s.accept()[0]
    c.close(); a.recv(1); a.close(); s.close()
"""
        )
    )
    time.sleep(0.05)
    seen = w.finish()
    states = [(r, e) for r, e in zip(seen.records, seen.events(), strict=True) if isinstance(e, TcpState)]
    for family in ("ipv4", "ipv6"):
        steps = {(e.old_state, e.new_state) for _, e in states if e.family == family}
        assert {
            ("CLOSE", "LISTEN"),
            ("CLOSE", "SYN_SENT"),
            ("SYN_SENT", "ESTABLISHED"),
            ("SYN_RECV", "ESTABLISHED"),
        } <= steps
    for r, event in states:
        assert (event.attribution == "none") == (r.tgid == 0)
        assert r.tgid in (0, pid)


def test_nobody_listens_after_the_end(watch: Start, tmp_path: Path) -> None:
    """Detached programs record nothing more."""
    w = watch()
    w.kernel.detach()
    before = w.kernel.counters()
    w.python(OPEN_ALL, tmp_path)
    assert before == w.kernel.counters()
