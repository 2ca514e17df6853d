"""`make bench-functions`: what watched functions cost, as the table of docs/performance.md has it.

    python -m tests.bench.functions [LIBRARY GLOB CALLED]

Ten thousand functions of a real library are watched at once; a program calls one of them in a loop.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stella_collector import targets
from stella_collector.binaries.attaching import Prober
from stella_collector.binaries.file_probes import FileProbes
from stella_collector.binaries.reader import Reader
from stella_collector.binaries.watch import Binaries
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_shared import kernel_records, raw_batches
from tests.collector.conftest import signals_of
from tests.collector.functions_kit import compiled, entry, heeding
from tests.system.node import Cgroup

DEFAULT = ("/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1", ("_ZN4llvm1*", "_ZN4llvm3*", "LLVM*"), "LLVMGetGlobalContext")
CALLS = 100_000
NEW = 20

CALLER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int main(int argc, char **argv)
{
	struct timespec from, to;
	long calls = atol(argv[3]);
	clock_gettime(CLOCK_MONOTONIC, &from);
	void *(*called)(void) = (void *(*)(void))dlsym(dlopen(argv[1], RTLD_NOW), argv[2]);
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("%ld\n", (to.tv_sec - from.tv_sec) * 1000000000L + to.tv_nsec - from.tv_nsec);
	fflush(stdout);
	getchar();
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (long i = 0; i < calls; i++)
		called();
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("%ld\n", (to.tv_sec - from.tv_sec) * 1000000000L + to.tv_nsec - from.tv_nsec);
	return 0;
}
"""


def kernel_kb() -> int:
    """Return what the kernel holds for itself: slabs and per-CPU memory, in KiB."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(rows[name].split()[0]) for name in ("Slab", "Percpu", "VmallocUsed"))


def rss_kb() -> int:
    """Return this process's resident memory in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 10


@contextmanager
def timed(owner: type, method: str, took: dict[str, float]) -> Iterator[None]:
    """Add up the milliseconds that a method takes."""
    original = getattr(owner, method)

    def wrapper(*words: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*words, **more)
        finally:
            took[method] = took.get(method, 0.0) + (time.perf_counter() - began) * 1000

    setattr(owner, method, wrapper)
    try:
        yield
    finally:
        setattr(owner, method, original)


@contextmanager
def watching(cgroup: Cgroup, functions: list[dict[str, Any]]) -> Iterator[tuple[Kernel, dict[str, float]]]:
    """Give a kernel side that watches these functions in the cgroup, and what attaching took."""
    took: dict[str, float] = {}
    others = (
        "sys_enter_openat sched_process_exec inet_sock_set_state libc_connect libc_accept openssl_read openssl_write"
    )
    signals = signals_of(
        filters__target_cgroups=[cgroup.name],
        probes__functions=functions,
        ring_buffer_size=1 << 26,
        **{f"probes__{name}": False for name in others.split()},
    )
    with Kernel(signals, Libbpf()) as kernel:
        kernel.set_targets(targets.resolve(signals))
        before, own = kernel_kb(), rss_kb()
        time.sleep(0.5)  # the child that reads files has started
        began = time.perf_counter()
        with timed(Reader, "ask", took), timed(Prober, "attach", took), timed(FileProbes, "_make_digest", took):
            kernel.attach()
        took["all"] = (time.perf_counter() - began) * 1000
        took["kernel_mb"], took["own_mb"] = (kernel_kb() - before) / 1024, (rss_kb() - own) / 1024
        took.update(steps(kernel.binaries))
        yield kernel, took
        began = time.perf_counter()
        kernel.binaries.detach()
        took["detach_ms"] = (time.perf_counter() - began) * 1000


def steps(binaries: Binaries) -> dict[str, float]:
    """Return how many functions are watched."""
    return {"functions": float(sum(state.functions for state in binaries.states()))}


class Cost(NamedTuple):
    """What a process pays, and the calls that were recorded."""

    call_ns: float
    open_ms: float
    own_mb: float
    recorded: int = 0


def median(costs: list[Cost]) -> Cost:
    """Return the median of each cost, and the sum of the calls."""
    call_ns, open_ms, own_mb, recorded = zip(*costs, strict=True)
    return Cost(statistics.median(call_ns), statistics.median(open_ms), statistics.median(own_mb), sum(recorded))


def shown(cost: Cost) -> str:
    """Return the columns of a cost."""
    return f"{cost.open_ms:,.0f} | {cost.own_mb:.1f} | {cost.call_ns:,.0f}"


def cost(program: Path, words: list[str], cgroup: Cgroup | None, kernel: Kernel | None) -> Cost:
    """Run the caller."""
    command = [str(program), *words]
    process = (
        cgroup.run(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if cgroup
        else subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    assert process.stdin and process.stdout
    open_ms = int(process.stdout.readline()) / 1e6
    (anonymous,) = [r for r in Path(f"/proc/{process.pid}/status").read_text().splitlines() if r.startswith("RssAnon")]
    own_mb = int(anonymous.split()[1]) / 1024
    time.sleep(0.2)
    recorded = 0
    stop = threading.Event()

    def drain() -> None:
        nonlocal recorded
        assert kernel is not None
        while not stop.wait(0.005):
            drained = kernel.ring.drain(1 << 20)
            for record in raw_batches.records(drained.records):
                if record.type == kernel_records.FUNCTION_CALL and words[1].encode() in record.body:
                    recorded += kernel_records.FUNCTION_CALL_BODY.unpack_from(record.body)[1]

    process.stdin.write(b"x")
    process.stdin.flush()
    ns = int(process.stdout.readline())
    process.communicate(timeout=30)
    if kernel is not None:
        kernel.binaries.flush()
        thread = threading.Thread(target=drain)
        thread.start()
        while kernel.ring.waiting():
            time.sleep(0.02)
        time.sleep(0.02)
        stop.set()
        thread.join()
    return Cost(ns / int(words[2]), open_ms, own_mb, recorded)


class Holder:
    """A kernel side, as `heeding` wants it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel


def delays(cgroup: Cgroup, folder: Path) -> dict[str, list[float]]:
    """Return the ms from the kernel's notice to attached, for programs and libraries that are all new."""
    found: dict[str, list[float]] = {}
    for kind in ("exec", "dlopen"):
        with watching(cgroup, [entry(f"{folder}/new-{kind}-*", "called", mode="count")]) as (kernel, _):
            with heeding(Holder(kernel)):
                for index in range(NEW):
                    source = f"int called(void) {{ return {index}; }}"
                    if kind == "exec":
                        source += "\n#include <unistd.h>\nint main(void) { called(); usleep(300000); return 0; }"
                    new = compiled(folder, f"new-{kind}-{index}", source, *(["-shared"] if kind == "dlopen" else []))
                    words = [new] if kind == "exec" else [folder / "caller", new, "called", "1"]
                    process = cgroup.run(*words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
                    time.sleep(0.25)
                    process.communicate(b"x", timeout=10)
            found[kind] = sorted(us / 1000 for us in kernel.binaries.delays_us)
    return found


def map_mb(kernel: Kernel, name: str) -> float:
    """Return what a map takes, as the kernel charges it."""
    rows = Path(f"/proc/self/fdinfo/{kernel._object.map_fd(name)}").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith("memlock")]
    return int(row.split()[1]) / (1 << 20)


def main() -> None:
    """Measure, and print the tables."""
    words = sys.argv[1:]
    library, globs, called = (words[0], (words[1], words[2]), words[2]) if len(words) == 3 else DEFAULT
    cgroup = Cgroup("bench-functions")
    try:
        with tempfile.TemporaryDirectory() as name:
            program = compiled(Path(name), "caller", CALLER)
            arguments = [library, called, str(CALLS)]
            head = ("watched", "functions", "attach ms: read / link / digest / all", "detach ms", "kernel MB",
                    "collector MB", "dlopen ms", "MB of the process", "ns a call", "recorded")  # fmt: skip
            print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
            bare = median([cost(program, arguments, None, None) for _ in range(5)])
            print("| nothing | 0 | – | – | – | – |", shown(bare), "| – |")
            for label, more in (
                ("trace with stacks", {"mode": "trace"}),
                ("trace", {"mode": "trace", "stack": False}),
                ("count", {"mode": "count"}),
            ):
                with watching(cgroup, [entry(library, *globs, **more)]) as (kernel, took):
                    paid = median([cost(program, arguments, cgroup, kernel) for _ in range(3)])
                    maps = ", ".join(
                        f"{map_name} {map_mb(kernel, map_name):.1f} MB"
                        for map_name in ("stella_functions", "stella_counts", "stella_counted", "stella_seen")
                    )
                    other = median([cost(program, arguments, None, None) for _ in range(3)])
                print(
                    f"| {label} | {took['functions']:,.0f} | "
                    f"{' / '.join(f'{took[step]:,.0f}' for step in ('ask', 'attach', '_make_digest', 'all'))} | "
                    f"{took['detach_ms']:,.0f} | {took['kernel_mb']:.1f} | {took['own_mb']:.1f} | {shown(paid)} | "
                    f"{paid.recorded:,} of {3 * CALLS:,} |"
                )
            print("| count, by no target | – | – | – | – | – |", shown(other), "| – |")
            print(f"\nmaps: {maps}")
            for kind, ms in delays(cgroup, Path(name)).items():
                print(
                    f"{kind} to attached, {len(ms)} of {NEW} new files: "
                    f"{ms[0]:.0f} / {statistics.median(ms):.0f} / {ms[-1]:.0f} ms (least, median, most)"
                )
    finally:
        cgroup.remove()


if __name__ == "__main__":
    main()
