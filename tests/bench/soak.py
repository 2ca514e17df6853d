"""`make soak`: a node under an even load for a long time; what grows, and whether every event is accounted for.

Every few seconds each process's memory and open files are noted, with the latency of that span and the losses.
At the end the chain is verified and the lines are counted.  What "flat" means is said in numbers: the mean of the
last quarter against that of the second (the first is warming up).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench import load
from tests.bench.machine import touch
from tests.bench.measure import beats, count_lines, difference, memory_mb
from tests.system.node import Node, build_generator, running


def sample(node: Node, before: dict[str, Any]) -> dict[str, Any]:
    """Return what each process holds now, and the latency since the last sample."""
    rows: dict[str, Any] = {"at": time.monotonic(), "mb": {}, "files": {}}
    for name, pid in node.pids().items():
        rows["mb"][name] = memory_mb(pid)["pss"]
        rows["files"][name] = len(os.listdir(f"/proc/{pid}/fd"))
    rows["beats"] = beats(node)
    for key in ("line", "durable"):
        metric = f"stellaops_signals_{'kernel_to_line' if key == 'line' else 'durable'}_latency_seconds"
        if metric in rows["beats"]:
            spent = difference(rows["beats"][metric], before.get("beats", {}).get(metric))
            rows[f"{key}_p99_ms"] = spent.quantile(0.99) * 1000
    return rows


def quarters(values: list[float]) -> tuple[float, float]:
    """Return the mean of the second quarter and of the last."""
    n = max(1, len(values) // 4)
    return statistics.fmean(values[n : 2 * n] or values), statistics.fmean(values[-n:])


def run(rate: int, minutes: float, every: float, ring: int) -> dict[str, Any]:
    """Load a fresh node and return what was seen."""
    with tempfile.TemporaryDirectory(prefix="stella-soak-") as name:
        program = build_generator(Path(name))
        with running(Path(name) / "node", "soak", ring_buffer_size=ring) as node:
            load.opens(node.cgroup.run, program, 2000, 2000)
            time.sleep(1.5)
            count = int(rate * minutes * 60)
            work = threading.Thread(target=load.opens, args=(node.cgroup.run, program, count, rate))
            work.start()
            samples: list[dict[str, Any]] = [sample(node, {})]
            while work.is_alive():
                work.join(every)
                samples.append(sample(node, samples[-1]))
                shown = {k: v for k, v in samples[-1].items() if k != "beats"}
                print(json.dumps(shown), file=sys.stderr, flush=True)
            time.sleep(3)
            node.stop()
            report = node.verify()
            ledgers = node.ledgers()
            lost = sum(n for ledger in ledgers for n in ledger["lost"].values())
            lines = count_lines(node, {"opens": load.MARKER})["opens"]
    return {
        "rate": rate, "minutes": minutes, "made": count, "lines": lines, "lost": lost,
        "valid": bool(report.valid), "samples": samples,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    samples = result["samples"][1:]
    out = ["| | second quarter | last quarter | change |", "|---|---|---|---|"]
    for name in samples[0]["mb"]:
        for what, unit in (("mb", "MB"), ("files", "open files")):
            early, late = quarters([float(s[what].get(name, 0)) for s in samples])
            change = f"{(late / early - 1) * 100:+.1f} %" if early else "-"
            out.append(f"| {name}, {unit} | {early:.1f} | {late:.1f} | {change} |")
    for key, words in (("line_p99_ms", "kernel to line, p99 ms"), ("durable_p99_ms", "drain to fsync'd chunk, p99 ms")):
        values = [float(s[key]) for s in samples if key in s]
        if values:
            early, late = quarters(values)
            out.append(f"| {words} | {early:.0f} | {late:.0f} | worst {max(values):.0f} |")
    return "\n".join(out)


def main() -> int:
    """Run the soak; 1 when an event is not accounted for."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--rate", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--ring", type=int, default=8 << 20, help="ring buffer size in bytes")
    parser.add_argument("--touch-gib", type=int, default=6, help="memory to use once before measuring; 0: none")
    args = parser.parse_args()
    touch(args.touch_gib << 30)
    result = run(args.rate, args.minutes, args.every, args.ring)
    print(table(result))
    exact = result["lines"] + result["lost"] >= result["made"] and result["valid"]
    chain = "valid" if result["valid"] else "INVALID"
    verdict = "every event is accounted for" if exact else "EVENTS ARE MISSING"
    counts = f"{result['made']:,} made, {result['lines']:,} lines of them, {result['lost']:,} lost"
    print(f"\n{counts}, chain {chain}: {verdict}")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
