"""What a probe costs: nanoseconds of kernel time for each event, as the kernel itself counts them.

    measure(kernel, lib) → a process in a cgroup of its own makes events, in bursts → run time / events

The kernel times programs while `BPF_ENABLE_STATS` is on.  Only the workload's cgroup is a target, so nobody else's
event is recorded; those that others cause end at the target filter, and are few beside the workload's.
Filters of paths and networks are not in the figure: the caller leaves them out of the configuration.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stella_collector import targets
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_collector.targets import Target
from stella_shared.errors import StellaError

#: Which work makes events of a probe, events in a burst, and bursts.  A burst fits into any ring worth having.
WORK: Final = {
    "sys_enter_openat": ("open", 200, 20),
    "sched_process_exec": ("exec", 20, 5),
    "inet_sock_set_state": ("tcp", 50, 10),
    "libc_connect": ("tcp", 50, 10),
    "libc_accept": ("tcp", 50, 10),
    "openssl_read": ("tls_read", 200, 10),
    "openssl_write": ("tls_write", 200, 10),
}
_ANSWER_SECONDS: Final = 5.0
_DRAIN_BYTES: Final = 512 << 10


def measure(kernel: Kernel, lib: Libbpf) -> dict[str, tuple[float, int]]:
    """Return (nanoseconds an event, events counted) of each attached probe that can be measured here.

    Raises `StellaError` where nothing can be: no right to a cgroup, a kernel that does not time programs.
    """
    found: dict[str, tuple[float, int]] = {}
    with _timing(lib), _cgroup() as (path, target), _worker(path, kernel.libraries) as worker:
        kernel.set_targets([target])
        for state in kernel.states:
            if state.attached and state.name in WORK:
                kind, events, bursts = WORK[state.name]
                before = kernel.run_times(state.name)
                for _ in range(bursts):
                    _burst(worker, kind, events)
                    while kernel.ring.drain(_DRAIN_BYTES).left:
                        pass
                ran = [
                    (ns - ns0, runs - runs0)
                    for (ns, runs), (ns0, runs0) in zip(kernel.run_times(state.name), before, strict=True)
                ]
                # Entry and exit of one event are two programs; the busiest tells how many events there were.
                counted = max((runs for _, runs in ran), default=0)
                if counted:
                    found[state.name] = (round(sum(ns for ns, _ in ran) / counted, 1), counted)
        kernel.set_targets([])
    return found


@contextlib.contextmanager
def _timing(lib: Libbpf) -> Iterator[None]:
    fd = lib.count_run_time()
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _cgroup() -> Iterator[tuple[Path, Target]]:
    """Make a cgroup for the length of the block."""
    hierarchy = targets.hierarchies()[0]
    path = hierarchy.root / f"stella-test-probes-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as e:
        raise StellaError(f"no cgroup for a workload: {e.strerror}") from None
    try:
        yield path, Target(f"/{path.name}", path.stat().st_ino | hierarchy.flag, 1)
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.01)  # the last process of it is just ending


@contextlib.contextmanager
def _worker(cgroup: Path, libraries: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "stella_collector.probe_workload", str(cgroup), *libraries[:1]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as worker:
        try:
            _hear(worker)
            yield worker
        finally:
            worker.kill()


def _burst(worker: subprocess.Popen[bytes], kind: str, events: int) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(f"{kind} {events}\n".encode())
        worker.stdin.flush()
    except OSError as e:
        raise StellaError(f"the workload ended: {e.strerror}") from None
    _hear(worker)


def _hear(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], _ANSWER_SECONDS)
    if not ready or not worker.stdout.readline():
        raise StellaError("the workload does not answer")
