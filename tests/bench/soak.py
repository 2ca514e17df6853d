"""`make soak`: a node under an even load for a long time; what grows, and whether every event is accounted for.

Every few seconds each process's memory and open files are noted, with the latency of that span and the losses.
At the end the chain is verified, the lines are counted, and a verdict says what is wrong.  "Flat" is said in numbers:
the mean of the last quarter against that of the second (the first is warming up), see `GROWTH`.
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

WARM = 2000


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
            load.opens(node.cgroup.run, program, WARM, WARM)
            time.sleep(1.5)
            count, pids = int(rate * minutes * 60), node.pids()
            work = threading.Thread(target=load.opens, args=(node.cgroup.run, program, count, rate))
            work.start()
            samples: list[dict[str, Any]] = [sample(node, {})]
            while work.is_alive():
                work.join(every)
                samples.append(sample(node, samples[-1]))
                shown = {k: v for k, v in samples[-1].items() if k != "beats"}
                print(json.dumps(shown), file=sys.stderr, flush=True)
            time.sleep(3)
            pids_after = node.pids()
            node.stop()
            report = node.verify()
            ledgers = node.ledgers()
            lost = sum(n for ledger in ledgers for n in ledger["lost"].values())
            lines = count_lines(node, {"opens": load.MARKER})["opens"]
    return {
        # The warming up is among the lines, and so are the files that the generator makes each time.
        "rate": rate, "minutes": minutes, "made": count + WARM + 2 * load.FILES, "lines": lines, "lost": lost,
        "valid": bool(report.valid), "samples": samples, "pids_before": pids, "pids_after": pids_after,
    }  # fmt: skip


#: What may grow between the second quarter and the last: a share, and what is noise in small figures.
GROWTH = {"mb": (0.05, 8.0), "files": (0.0, 2.0), "ms": (0.5, 25.0)}


def rows(result: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Return each thing that must stay flat: its name, its second quarter, its last, and what is wrong with it."""
    samples = result["samples"][1:]
    found: list[tuple[str, str, list[float]]] = []
    for name in samples[0]["mb"]:
        for what, unit in (("mb", "MB"), ("files", "open files")):
            found.append((f"{name}, {unit}", what, [float(s[what].get(name, 0)) for s in samples]))
    for key, words in (("line_p99_ms", "kernel to line, p99 ms"), ("durable_p99_ms", "drain to fsync'd chunk, p99 ms")):
        found.append((words, "ms", [float(s[key]) for s in samples if key in s]))
    out = []
    for name, what, values in found:
        if not values:
            out.append((name, 0.0, 0.0, "was never told"))
            continue
        early, late = quarters(values)
        share, noise = GROWTH[what]
        out.append((name, early, late, "GROWS" if late > early * (1 + share) + noise else ""))
    return out


def faults(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with a soak; nothing when it is good."""
    out = [f"{name}: {early:.1f} → {late:.1f} {fault}" for name, early, late, fault in rows(result) if fault]
    made, lines, lost = result["made"], result["lines"], result["lost"]
    # Which events were lost nobody can say; without a loss the lines must be exactly those that were made.
    if not made - lost <= lines <= made:
        out.append(f"{made:,} events were made, {lines:,} are lines, {lost:,} lost")
    if result["pids_before"] != result["pids_after"]:
        out.append("a part was started anew")
    return out if result["valid"] else ["the chain does not verify", *out]


def table(result: dict[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    out = ["| | second quarter | last quarter | |", "|---|---|---|---|"]
    out += [f"| {name} | {early:.1f} | {late:.1f} | {fault} |" for name, early, late, fault in rows(result)]
    return "\n".join(out)


def main() -> int:
    """Run the soak; 1 when something grows or an event is not accounted for."""
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
    found = faults(result)
    counts = f"{result['made']:,} made, {result['lines']:,} lines of them, {result['lost']:,} lost"
    print(f"\n{counts}, chain {'valid' if result['valid'] else 'INVALID'}")
    for fault in found:
        print(f"  {fault}")
    print(f"Verdict: {'NOT GOOD' if found else 'good: flat, nothing leaks, every event is accounted for'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
