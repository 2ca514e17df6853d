"""How much an unthrottled program is slowed down, and by whom: nobody, a reader that only drains, a node, its peers.

Each records the opens of one program and nothing else: the peers by its pid, ours by its cgroup.  The program opens
as fast as it goes for some seconds; who wakes up for each event holds it back, and then loses nothing for that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stella_collector import targets
from stella_collector.accounting import decode_counters
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_shared import config
from tests.bench import load, machine, measure
from tests.system.node import Cgroup, running

HERE = Path(__file__).parent
HEADERS = Path("/usr/src")
_ATTACH_SECONDS = 40.0
_QUIET_SECONDS = 1.5
_PRINT_SECONDS = 30.0


class CannotRun(Exception):
    """Why a recorder cannot be measured here."""


class Recording(msgspec.Struct):
    """What a recorder made of one run of the program."""

    delivered: int | None = None
    lost: int | None = None
    cpu_seconds: float = 0.0


class Attached(Protocol):
    """A recorder that watches `cgroup`, or with `watch` one process in it."""

    cgroup: Cgroup

    def watch(self, pid: int) -> None:
        """Begin, when the process to be recorded is there and waits."""

    def finish(self, made: load.Load) -> Recording:
        """Return what was recorded, when all that was made has arrived."""


class _Nobody:
    def __init__(self, cgroup: Cgroup) -> None:
        self.cgroup = cgroup

    def watch(self, pid: int) -> None:
        pass

    def finish(self, made: load.Load) -> Recording:
        return Recording()


@contextmanager
def nobody(_: Path, ring: int) -> Iterator[Attached]:
    """Nothing is attached."""
    with _own_cgroup() as cgroup:
        yield _Nobody(cgroup)


@contextmanager
def _own_cgroup() -> Iterator[Cgroup]:
    cgroup = Cgroup("bench-compare")
    try:
        yield cgroup
    finally:
        cgroup.remove()


def _ring_fd(size: int) -> int:
    """Return this process's descriptor of the ring buffer of events: a map of that kind and size."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            told = Path(f"/proc/self/fdinfo/{name}").read_text()
            if re.search(r"^map_type:\s*27$", told, re.M) and re.search(rf"^max_entries:\s*{size}$", told, re.M):
                return int(name)
    raise CannotRun("the ring buffer was not found among the process's descriptors")


class _Reader:
    def __init__(self, cgroup: Cgroup, kernel: Kernel, program: subprocess.Popen[bytes]) -> None:
        self.cgroup = cgroup
        self._kernel = kernel
        self._program = program
        self._cpu = 0.0
        self._lost = 0

    def _counted_lost(self) -> int:
        return sum(sum(lane.lost) for lane in decode_counters(self._kernel.counters()))

    def watch(self, pid: int) -> None:
        self._cpu = measure.cpu_seconds(self._program.pid)
        self._lost = self._counted_lost()

    def finish(self, made: load.Load) -> Recording:
        assert self._program.stdin and self._program.stdout
        time.sleep(0.1)
        spent = measure.cpu_seconds(self._program.pid) - self._cpu
        self._program.stdin.close()
        records = int(self._program.stdout.read())
        # The program's own start is recorded too, before the first open that counts.
        return Recording(min(records, made.opens), self._counted_lost() - self._lost, spent)


@contextmanager
def reader(folder: Path, ring: int) -> Iterator[Attached]:
    """Our probes, with a C program that only drains: the physical limit."""
    program = folder / "drain"
    subprocess.run(["cc", "-O2", "-o", program, HERE / "drain.c"], check=True)
    with _own_cgroup() as cgroup:
        signals = config.load(
            None,
            {},
            {
                "ring_buffer_size": ring,
                "filters.target_cgroups": [cgroup.name],
                "filters.paths.allowlist": [],
                "filters.paths.denylist": [],
                "filters.networks.denylist": [],
            },
        )
        with Kernel(signals, Libbpf()) as kernel:
            kernel.set_targets(targets.resolve(signals))
            kernel.attach()
            fd = _ring_fd(ring)
            command = [program, str(fd), str(ring)]
            with subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                assert process.stdout
                process.stdout.readline()
                try:
                    yield _Reader(cgroup, kernel, process)
                finally:
                    process.kill()


class _Node:
    def __init__(self, node: Any) -> None:
        self.cgroup = node.cgroup
        self._node = node
        self._cpu: dict[str, float] = {}

    def watch(self, pid: int) -> None:
        time.sleep(1.5)  # the program is known to every part
        self._cpu = measure.cpu_by_part(self._node)

    def finish(self, made: load.Load) -> Recording:
        measure.catch_up(self._node)
        spent = sum(after - self._cpu.get(part, 0.0) for part, after in measure.cpu_by_part(self._node).items())
        self._node.stop()
        checked = measure.outcome(self._node, {"opens": (load.MARKER, made.opens)})
        if not checked["exact"]:
            raise CannotRun(f"the evidence does not add up: {checked}")
        return Recording(checked["lines"]["opens"], checked["lost"], spent)


@contextmanager
def whole_node(folder: Path, ring: int) -> Iterator[Attached]:
    """A whole node: every probe, enrichment, chunks, signatures."""
    with running(folder / "node", "bench", ring_buffer_size=ring) as node:
        yield _Node(node)


class _Peer:
    """A program that prints a line for each open, into a file in memory."""

    def __init__(self, cgroup: Cgroup, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.cgroup = cgroup
        self._out, self._err = folder / "peer.out", folder / "peer.err"
        self._command, self._environment = command, environment
        self.process: subprocess.Popen[bytes] | None = None
        self._cpu = 0.0

    def watch(self, pid: int) -> None:
        command = [word.replace("PID", str(pid)) for word in self._command]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **self._environment}
            )
        self._wait_until_attached(self.process)
        self._cpu = measure.cpu_seconds(self.process.pid)

    def _wait_until_attached(self, process: subprocess.Popen[bytes]) -> None:
        # It has loaded a program, and opens nothing more: then it is attached and waits for events.
        deadline = time.monotonic() + _ATTACH_SECONDS
        before: list[str] = []
        since = time.monotonic()
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CannotRun(self.last_words())
            held = []
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.append(os.readlink(fd))
            if held != before:
                before, since = held, time.monotonic()
            elif any("bpf-prog" in name for name in held) and time.monotonic() - since > _QUIET_SECONDS:
                return
            time.sleep(0.1)
        raise CannotRun(f"it did not attach in {_ATTACH_SECONDS:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        """Return the last line that the program said to standard error."""
        lines = self._err.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def finish(self, made: load.Load) -> Recording:
        assert self.process
        size, deadline, since = -1, time.monotonic() + _PRINT_SECONDS, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < _QUIET_SECONDS:
            if (now := self._out.stat().st_size) != size:
                size, since = now, time.monotonic()
            time.sleep(0.1)
        spent = measure.cpu_seconds(self.process.pid) - self._cpu
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        marker = load.MARKER
        with self._out.open("rb") as lines:
            delivered = sum(1 for line in lines if marker in line)
        said = self._err.read_text(errors="replace")
        lost = sum(int(n) for n in re.findall(r"[Ll]ost (\d+)", said))
        return Recording(delivered, lost, spent)


@contextmanager
def _peer(folder: Path, command: list[str], environment: dict[str, str] | None = None) -> Iterator[Attached]:
    if shutil.which(command[0]) is None:
        raise CannotRun(f"{command[0]} is not installed")
    with _own_cgroup() as cgroup, tempfile.TemporaryDirectory(prefix="stella-peer-", dir="/dev/shm") as memory:
        peer = _Peer(cgroup, Path(memory), command, environment or {})
        try:
            yield peer
        finally:
            if peer.process is not None and peer.process.poll() is None:
                peer.process.kill()
                peer.process.wait()


@contextmanager
def bpftrace(folder: Path, ring: int) -> Iterator[Attached]:
    """bpftrace's one-liner."""
    text = (
        'tracepoint:syscalls:sys_enter_openat /pid == PID/ { printf("%d %s %s\\n", pid, comm, str(args->filename)); }'
    )
    with _peer(folder, ["bpftrace", "-e", text]) as peer:
        yield peer


@contextmanager
def opensnoop(folder: Path, ring: int) -> Iterator[Attached]:
    """libbpf-tools' opensnoop, which hooks entry and exit."""
    with _peer(folder, [shutil.which("opensnoop", path="/usr/sbin:/usr/bin") or "opensnoop", "-p", "PID"]) as peer:
        yield peer


@contextmanager
def bcc(folder: Path, ring: int) -> Iterator[Attached]:
    """A bcc script in the shape of its opensnoop."""
    with _peer(folder, ["/usr/bin/python3", str(HERE / "bcc_opens.py"), "PID"], _kernel_source(folder)) as peer:
        yield peer


def _kernel_source(folder: Path) -> dict[str, str]:
    """Return the environment in which bcc finds kernel headers: the kernel's own, else Debian's, put together.

    The script reads nothing but the tracepoint's arguments, whose layout bcc takes from tracefs, so the headers of
    another version will do.  Debian has them in two folders, bcc looks in one.
    """
    if Path(f"/lib/modules/{os.uname().release}/build").exists() or Path("/sys/kernel/kheaders.tar.xz").exists():
        return {}
    own = sorted(path for path in HEADERS.glob("linux-headers-*") if not path.name.endswith("-common"))
    if not own:
        raise CannotRun("there are no kernel headers, and without them bcc compiles nothing")
    merged = folder / "headers"
    shared = own[-1].with_name(own[-1].name.rsplit("-", 1)[0] + "-common")
    for source in (shared, own[-1]):
        for part in ("include", "arch"):
            merged.mkdir(exist_ok=True)
            subprocess.run(["cp", "-as", "--remove-destination", source / part, merged], check=True)
    return {"BCC_KERNEL_SOURCE": str(merged)}


#: By name: who records, and how many opens it takes to keep the program busy for about three seconds.
RECORDERS = {
    "nobody": (nobody, 4_000_000),
    "C reader, drains only": (reader, 3_000_000),
    "Stella Signals, whole node": (whole_node, 3_000_000),
    "bpftrace": (bpftrace, 300_000),
    "libbpf-tools opensnoop": (opensnoop, 300_000),
    "bcc script": (bcc, 300_000),
}


def versions() -> dict[str, str]:
    """Return what the peers say they are."""
    asked = {
        "bpftrace": ("bpftrace", "--version"),
        "libbpf-tools opensnoop": ("dpkg-query", "-W", "libbpf-tools"),
        "bcc script": ("dpkg-query", "-W", "python3-bpfcc"),
    }
    return {name: machine.version(*command).replace("\t", " ") for name, command in asked.items()}


def run(program: Path, name: str, ring: int, scale: float = 1.0) -> dict[str, Any]:
    """Let one recorder record one run of the program; a row that says why when it cannot."""
    make, count = RECORDERS[name]
    count = int(count * scale)
    try:
        with tempfile.TemporaryDirectory(prefix="stella-compare-") as folder, make(Path(folder), ring) as attached:
            with load.ready(attached.cgroup.run, program, count, 0) as generator:
                attached.watch(generator.pid)
                with machine.watched() as busy:
                    made = generator.run()
            recorded = attached.finish(made)
    except (CannotRun, OSError, subprocess.SubprocessError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return {"name": name, "cannot": str(e)}
    row: dict[str, Any] = {
        "name": name,
        "count": count,
        "made_per_second": round(count / made.wall_seconds),
        "wall_ns": round(made.wall_ns),
        "cpu_ns": round(made.cpu_ns),
        **busy,
    }
    if recorded.delivered is not None:
        # Peers begin after the files were made; ours has those opens too.
        delivered = min(recorded.delivered, count)
        row |= {
            "delivered_per_second": round(delivered / made.wall_seconds),
            "missing": count - delivered,
            "lost_reported": recorded.lost,
            "cpu_us": round(recorded.cpu_seconds / max(1, delivered) * 1e6, 3),
        }
    return row
