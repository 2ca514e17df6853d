"""A machine's worth of containers: opens, program starts, connections and TLS, from many processes at once.

Each container is a cgroup of the name that Docker gives one, so that its id is found out as on a real machine; there
is no engine to ask for its image, and the lines say so.  TLS is OpenSSL's.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from stella_shared import metrics
from tests.bench import machine, measure
from tests.system.node import Node, running

HERE = Path(__file__).parent
_TLS_PROCESSES = 2
_READY_SECONDS = 60.0
SETTLE_SECONDS = 2.0
_MARKERS = {
    "opens": b"/libmodule-",
    "execs": b"stella-mixed-exec",
    "connects": b'"direction":"connect"',
    "accepts": b'"direction":"accept"',
    "tls": b'"type":"ssl_op"',
}


class Plan(msgspec.Struct, frozen=True):
    """What is to be made, all a second and of all processes together.

    A connection is a connect, an accept and some ten changes of TCP state; a TLS record is a write and a read.
    """

    events: int
    seconds: float
    containers: int = 50
    processes: int = 200
    execs: int = 200
    connections: int = 1000
    tls_records: int = 2000

    @property
    def opens(self) -> int:
        """Opens a second: what the others leave of the events."""
        return max(0, self.events - self.execs - 12 * self.connections - 2 * self.tls_records)


def build(folder: Path) -> None:
    """Compile the programs, and make a throw-away certificate."""
    (folder / "tiny.c").write_text("int main(void) { return 0; }\n")
    for name, source, options in (
        ("tiny", folder / "tiny.c", ["-static"]),
        ("mixed", HERE / "mixed.c", ["-static"]),
        ("tls", HERE / "tls.c", ["-l:libssl.so.3", "-l:libcrypto.so.3"]),
    ):
        subprocess.run(["cc", "-O2", "-o", folder / name, source, *options], check=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=localhost", "-days", "2", "-keyout", folder / "key.pem", "-out", folder / "crt.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "tls.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "crt.pem").read_bytes())


def _command(programs: Path, work: Path, number: int, plan: Plan) -> list[str]:
    each = [plan.opens / plan.processes, plan.execs / plan.processes, plan.connections / plan.processes]
    per_container = plan.processes // plan.containers
    return [
        str(programs / "mixed"), str(work), str(number), str(per_container), str(plan.seconds),
        *(f"{rate:.6f}" for rate in each), str(programs / "tiny"),
    ]  # fmt: skip


@contextmanager
def _in_cgroups(node: Node, programs: Path, work: Path, plan: Plan) -> Iterator[None]:
    """Start one group of processes in each of `plan.containers` cgroups below the node's."""
    made: list[Path] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(plan.containers):
            path = node.cgroup.path / f"docker-{hashlib.sha256(str(number).encode()).hexdigest()}.scope"
            path.mkdir()
            made.append(path)
            enter = ["/bin/sh", "-c", f'echo $$ > "{path}/cgroup.procs" && exec "$0" "$@"']
            processes.append(subprocess.Popen([*enter, *_command(programs, work, number, plan)]))
        yield
    finally:
        for path in made:
            # Each with the processes that it forked.
            with contextlib.suppress(OSError):
                (path / "cgroup.kill").write_text("1")
        for process in processes:
            process.wait()
        for path in made:
            _remove(path)


def _remove(path: Path) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            path.rmdir()
            return
        time.sleep(0.05)


@contextmanager
def _tls(node: Node, programs: Path, work: Path, plan: Plan) -> Iterator[list[subprocess.Popen[bytes]]]:
    rate = plan.tls_records / _TLS_PROCESSES
    command = [programs / "tls", str(work), str(programs / "tls.pem"), str(plan.seconds), f"{rate:.6f}"]
    processes = [node.cgroup.run(*command, stdout=subprocess.PIPE) for _ in range(_TLS_PROCESSES)]
    try:
        for process in processes:
            assert process.stdout
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"tests/bench/tls.c ended with {process.wait()}")
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def _all_attached(node: Node) -> None:
    # TLS probes are attached when a process of the target has been seen to map the library.
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
        if all(probe["attached"] for probe in collector["detail"]["probes"]):
            return
        time.sleep(0.2)
    raise TimeoutError(f"not every probe is attached after {_READY_SECONDS:.0f} s")


def _results(work: Path, plan: Plan) -> list[list[int]]:
    deadline = time.monotonic() + 3 * plan.seconds + _READY_SECONDS
    while len(found := sorted(work.glob("result-*"))) < plan.containers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(found)} of {plan.containers} groups of processes have ended")
        time.sleep(0.1)
    return [[int(word) for word in path.read_text().split()] for path in found]


def _events(node: Node) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, labels, value in measure.series(node).rows:
        if name == metrics.EVENTS_TOTAL:
            kind = labels.split('type="')[1].split('"')[0]
            out[kind] = out.get(kind, 0.0) + value
    return out


def run(plan: Plan, ring: int, enrichers: int = 1) -> dict[str, Any]:
    """Measure a fresh node under the plan's load."""
    with (
        tempfile.TemporaryDirectory(prefix="stella-bench-") as name,
        tempfile.TemporaryDirectory(prefix="stella-mixed-", dir="/dev/shm") as work,
        running(Path(name) / "node", "mixed", ring_buffer_size=ring, enrichers=enrichers) as node,
    ):
        build(Path(name))
        with _in_cgroups(node, Path(name), Path(work), plan), _tls(node, Path(name), Path(work), plan) as tls:
            _all_attached(node)
            time.sleep(SETTLE_SECONDS)
            cpu, seen, latencies = measure.cpu_by_part(node), _events(node), measure.beats(node)
            with machine.watched() as busy:
                (Path(work) / "go").touch()
                groups = _results(Path(work), plan)
            records = sum(int(process.communicate(timeout=30)[0]) for process in tls)
            memory = measure.memory_by_part(node)
            lag = measure.catch_up(node)
            time.sleep(1.2)  # the last beats
            spent = {part: after - cpu.get(part, 0.0) for part, after in measure.cpu_by_part(node).items()}
            events = {kind: round(n - seen.get(kind, 0.0)) for kind, n in _events(node).items()}
            after = measure.beats(node)
        node.stop()
        opens, execs, connects, _, cpu_us = (sum(column) for column in zip(*groups, strict=True))
        made = {"opens": opens, "execs": execs, "connects": connects, "accepts": connects, "tls": 2 * records}
        checked = measure.outcome(node, {kind: (_MARKERS[kind], n) for kind, n in made.items()})
    total = sum(events.values())
    return {
        "asked": plan.events,
        "plan": msgspec.to_builtins(plan),
        "events_per_second": round(total / (max(row[3] for row in groups) / 1e9)),
        "events": events,
        "made": made,
        "load_cpu_us": round(cpu_us / total, 3),
        "cpu_us": measure.shares(spent, total),
        "cpu_us_total": round(sum(spent.values()) / total * 1e6, 3),
        "pss_mb_total": round(sum(m["pss"] for m in memory.values()), 1),
        "lag_seconds": lag,
        **busy,
        **measure.latencies(after, latencies),
        **checked,
    }
