"""`make bench`: a stream of opens at rising rates through a whole node, and what it costs.

Each row is one run of a fresh node (all processes, the bus with file storage and the generator on this
machine): events a second that were asked for and made, losses out of the signed ledgers, CPU time per event
of each process, latency kernel → enriched line and kernel → fsync'd chunk, from the node's own histograms.
The last rows are the unthrottled generator with and without the probes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from stella_shared.evidence.compressed import frames_of
from stella_shared.wire import Histogram
from tests.system.node import Node, build_generator, running

TICKS = os.sysconf("SC_CLK_TCK")
LATENCIES = {
    "line": "stellaops_signals_kernel_to_line_latency_seconds",
    "durable": "stellaops_signals_durable_latency_seconds",
    "signed": "stellaops_signals_signed_latency_seconds",
}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def generate(node: Node, program: Path, count: int, rate: int, files: int) -> tuple[float, float]:
    """Run the generator in the node's cgroup; return (seconds it took, its CPU seconds)."""
    folder = Path("/dev/shm") / f"stella-bench-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    process = node.cgroup.run(
        program, folder, str(count), str(rate), str(files), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    process.stdout.readline()
    process.stdin.write(b"x")
    process.stdin.flush()
    elapsed, user, system = map(int, process.stdout.read().split())
    process.wait()
    return elapsed / 1e9, (user + system) / 1e6


def beats(node: Node) -> dict[str, Histogram]:
    """Return the latency histograms out of /metrics, summed over instances."""
    import urllib.request

    text = urllib.request.urlopen(f"http://127.0.0.1:{node.http}/metrics", timeout=5).read().decode()
    found: dict[str, dict[float, float]] = {}
    for line in text.splitlines():
        for name in LATENCIES.values():
            if line.startswith(f"{name}_bucket"):
                bound = float(line.split('le="')[1].split('"')[0])
                found.setdefault(name, {}).setdefault(bound, 0.0)
                found[name][bound] += float(line.rsplit(" ", 1)[1])
    out = {}
    for name, cumulative in found.items():
        bounds = sorted(cumulative)
        counts = [int(cumulative[b]) for b in bounds]
        steps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
        out[name] = Histogram([b for b in bounds if b != float("inf")], steps)
    return out


def difference(after: Histogram, before: Histogram | None) -> Histogram:
    """Return what was observed in between."""
    if before is None:
        return after
    return Histogram(after.bounds, [a - b for a, b in zip(after.counts, before.counts, strict=True)])


def run(program: Path, rate: int, seconds: float, ring: int, enrichers: int, **signals: Any) -> dict[str, Any]:
    """Measure one rate on a fresh node; `signals` are further keys of its configuration."""
    with tempfile.TemporaryDirectory(prefix="stella-bench-") as name:
        folder = Path(name)
        with running(folder, "bench", ring_buffer_size=ring, enrichers=enrichers, **signals) as node:
            generate(node, program, 2000, 2000, 64)  # everything is warm and known
            time.sleep(1.5)
            pids = node.pids()
            before, cpu = beats(node), {n: cpu_seconds(p) for n, p in pids.items()}
            count = int(rate * seconds) if rate else 3_000_000
            wall, generator = generate(node, program, count, rate, 64)
            waited = time.monotonic()
            while time.monotonic() - waited < 60:
                if not _behind(node):
                    break
                time.sleep(0.2)
            lag = time.monotonic() - waited
            time.sleep(1.2)
            spent = {n: cpu_seconds(p) - cpu[n] for n, p in pids.items()}
            after = beats(node)
            node.stop()
            report = node.verify()
            recorded = sum(
                frame.count(b"stella-bench") for path in node.evidence.glob("*.ndjson.zst") for frame in frames_of(path)
            )
            lost: dict[str, int] = {}
            for ledger in node.ledgers():
                for cause, n in ledger["lost"].items():
                    lost[cause] = lost.get(cause, 0) + n
    row: dict[str, Any] = {
        "rate": rate,
        "made_per_second": round(count / wall),
        "count": count,
        "lost": sum(lost.values()),
        "lost_by_cause": lost,
        "lines": recorded,
        "valid": bool(report.valid),
        "lag_seconds": round(lag, 2),
        "generator_ns": round(wall / count * 1e9) if not rate else round(generator / count * 1e9),
        "cpu_us": {n: round(s / count * 1e6, 3) for n, s in spent.items()},
    }
    row["cpu_us_total"] = round(sum(row["cpu_us"].values()), 3)
    for key, metric in LATENCIES.items():
        if metric in after:
            h = difference(after[metric], before.get(metric))
            row[f"{key}_p50_ms"] = h.quantile(0.5) * 1000
            row[f"{key}_p99_ms"] = h.quantile(0.99) * 1000
    return row


def _behind(node: Node) -> bool:
    details: dict[str, list[dict[str, Any]]] = {}
    for service in node.get("/status")["services"]:
        details.setdefault(service["service"], []).append(service["detail"])
    collector = details["collector"][0]
    enriched = sum(d["batches"] for d in details["enricher"])
    return int(collector["batches"]) - enriched > 2 or int(collector["spool_bytes"]) > 1 << 20


def baseline(program: Path) -> float:
    """Return ns per open of the unthrottled generator with nothing attached, the median of five."""
    folder = Path("/dev/shm") / f"stella-bench-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    times = []
    for _ in range(5):
        done = subprocess.run([program, folder, "1000000", "0", "64"], input=b"x", capture_output=True, check=True)
        times.append(int(done.stdout.split()[1]) / 1e6)
    return statistics.median(times)


def touch(gib: int) -> float:
    """Use `gib` GiB of memory once and give it back; return the seconds that took.

    A virtual machine gets its memory from the host page by page at first use, which may cost more than all else
    here together.  That is the machine's start and no part of the pipeline.
    """
    began = time.monotonic()
    with mmap.mmap(-1, max(1, gib << 30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        return time.monotonic() - began


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    parts = ["nats", "collector", "enricher", "signer", "gateway", "supervisor"]
    out = [
        "| asked/s | made/s | lost | lag s | line p50 / p99 ms | durable p50 / p99 ms | CPU µs/event: "
        + " / ".join(parts)
        + " | all | generator ns/open |"
    ]
    out.append("|" + "---|" * 9)
    for r in rows:
        shares = [sum(v for n, v in r["cpu_us"].items() if n.startswith(p)) for p in parts]
        out.append(
            f"| {r['rate'] or 'unthrottled'} | {r['made_per_second']} | {r['lost']} | {r['lag_seconds']} "
            f"| {r.get('line_p50_ms', 0):.0f} / {r.get('line_p99_ms', 0):.0f} "
            f"| {r.get('durable_p50_ms', 0):.0f} / {r.get('durable_p99_ms', 0):.0f} "
            f"| {' / '.join(f'{s:.2f}' for s in shares)} | {r['cpu_us_total']:.2f} | {r['generator_ns']} |"
        )
    return "\n".join(out)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rates", type=int, nargs="*", default=[50_000, 100_000, 150_000, 200_000, 250_000, 300_000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ring", type=int, default=8 << 20, help="ring buffer size in bytes")
    parser.add_argument("--enrichers", type=int, default=1)
    parser.add_argument("--unthrottled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--touch-gib", type=int, default=6, help="memory to use once before measuring; 0: none")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    rows = []
    print(f"touched {args.touch_gib} GiB in {touch(args.touch_gib):.1f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="stella-gen-") as name:
        program = build_generator(Path(name))
        bare = baseline(program) if args.unthrottled else 0.0
        for rate in [*args.rates, *([0] if args.unthrottled else [])]:
            rows.append(run(program, rate, args.seconds, args.ring, args.enrichers))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if args.unthrottled:
        seen = rows[-1]["generator_ns"]
        print(
            f"\nunthrottled generator: {bare:.0f} ns/open bare, {seen} ns/open traced: +{(seen / bare - 1) * 100:.0f} %"
        )
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode({"bare_ns": bare, "rows": rows}), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
