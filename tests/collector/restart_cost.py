"""What a restart takes, and what a collector's own work costs: `python -m tests.collector.restart_cost`, as root.

Five times kill -9 under 50,000 opens a second: from the death to the line that says that the next one goes on, and
what waited in the ring then.  Then CPU of the collector alone for an event, at 100,000 opens a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

from stella_shared.bus import Bus
from tests.collector.test_runs import Collector, wait_for_run
from tests.shared.nats_kit import serving
from tests.system.node import Cgroup, build_generator

KILLS, RATE, SECONDS = 5, 50_000, 12
CPU_RATE, CPU_SECONDS = 100_000, 6


def generate(cgroup: Cgroup, program: Path, work: Path, rate: int, seconds: int) -> subprocess.Popen[bytes]:
    """Start opening files, now."""
    process = cgroup.run(
        program, work, str(rate * seconds), str(rate), "16", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    process.stdout.readline()
    process.stdin.write(b"x")
    process.stdin.flush()
    return process


def cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads of a process."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


async def measure(folder: Path, url: str, cgroup: Cgroup) -> None:
    """Print the figures."""
    collector = Collector(folder, url, cgroup)
    program = build_generator(folder)
    log = folder / "log"
    try:
        with log.open("wb") as said:
            began = time.monotonic()
            collector.start(said)
            await wait_for_run(collector)
            print(f"first start, to its first batch on the bus: {time.monotonic() - began:.2f} s")
            load = generate(cgroup, program, collector.work, RATE, SECONDS)
            for kill in range(KILLS):
                await anyio.sleep(1.0)
                collector.end(signal.SIGKILL)
                began = time.monotonic()
                collector.start(said)
                while log.read_bytes().count(b"going on with run") <= kill:
                    await anyio.sleep(0.002)
                line = log.read_text().splitlines()[-1]
                print(f"away for {time.monotonic() - began:.2f} s; {line.partition(': ')[2]}")
            await anyio.to_thread.run_sync(load.communicate)
            assert collector.process is not None
            before = cpu_ns(collector.process.pid)
            load = generate(cgroup, program, collector.work, CPU_RATE, CPU_SECONDS)
            await anyio.to_thread.run_sync(load.communicate)
            await anyio.sleep(0.5)
            used = cpu_ns(collector.process.pid) - before
            print(f"CPU of the collector: {used / 1000 / CPU_RATE / CPU_SECONDS:.3f} µs an event")
            assert 0 == collector.end(signal.SIGTERM)
    finally:
        collector.close()


async def main() -> None:
    """Measure on a bus and in a cgroup of our own."""
    cgroup = Cgroup("restart-cost")
    try:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
            async with Bus.connect(server.url, name="restart-cost") as bus:
                await bus.ensure_streams()
                await measure(Path(folder), server.url, cgroup)
    finally:
        cgroup.remove()


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("this loads BPF programs: run it as root")
    anyio.run(main)
