"""What is read off a running node and off its evidence afterwards."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from stella_shared import metrics
from stella_shared.evidence.compressed import frames_of
from stella_shared.wire import Histogram
from tests.system.node import Node

LATENCIES = {
    "line": metrics.KERNEL_TO_LINE_LATENCY_SECONDS,
    "durable": metrics.DURABLE_LATENCY_SECONDS,
    "signed": metrics.SIGNED_LATENCY_SECONDS,
}
#: Batches of one beat to the next that a node without work is behind by.
_ALWAYS_BEHIND = 3
#: After this a node that is still behind is stopped: its queues are emptied then.
CATCH_UP_SECONDS = 120.0


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its threads so far, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def cpu_by_part(node: Node) -> dict[str, float]:
    """Return each process's CPU time so far, by the part's name."""
    return {name: cpu_seconds(pid) for name, pid in node.pids().items()}


def memory_mb(pid: int) -> dict[str, float]:
    """Return what a process holds: `pss` shares out what others map too, `rss` does not."""
    out = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in ("Rss", "Pss"):
            out[key.lower()] = round(int(rest.split()[0]) / 1024, 1)
    return out


def memory_by_part(node: Node) -> dict[str, dict[str, float]]:
    """Return each process's memory in MB, by the part's name."""
    return {name: memory_mb(pid) for name, pid in node.pids().items()}


class Series(msgspec.Struct):
    """One page of /metrics: (name, labels as written, value)."""

    rows: list[tuple[str, str, float]]

    def total(self, name: str, labels: str) -> float:
        """Return the sum over the series of `name` whose labels hold the text `labels`."""
        return sum(value for n, written, value in self.rows if n == name and labels in written)

    def histogram(self, name: str) -> Histogram | None:
        """Return a histogram, summed over instances."""
        cumulative: dict[float, float] = {}
        for n, written, value in self.rows:
            if n == f"{name}_bucket":
                bound = float(written.split('le="')[1].split('"')[0])
                cumulative[bound] = cumulative.get(bound, 0.0) + value
        bounds = sorted(cumulative)
        counts = [int(cumulative[bound]) for bound in bounds]
        steps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
        return Histogram([bound for bound in bounds if bound != float("inf")], steps) if bounds else None


def series(node: Node) -> Series:
    """Return what the gateway tells now."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{node.http}/metrics", timeout=5).read().decode()
    rows = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            left, value = line.rsplit(" ", 1)
            name, _, labels = left.partition("{")
            rows.append((name, labels, float(value)))
    return Series(rows)


def beats(node: Node) -> dict[str, Histogram]:
    """Return the latency histograms, by their metric's name."""
    told = series(node)
    found = {name: told.histogram(name) for name in LATENCIES.values()}
    return {name: histogram for name, histogram in found.items() if histogram is not None}


def difference(after: Histogram, before: Histogram | None) -> Histogram:
    """Return what was observed in between."""
    if before is None:
        return after
    return Histogram(after.bounds, [a - b for a, b in zip(after.counts, before.counts, strict=True)])


def latencies(after: dict[str, Histogram], before: dict[str, Histogram]) -> dict[str, float]:
    """Return p50 and p99 of what was observed in between, in ms: upper bounds of the histogram's buckets."""
    out = {}
    for key, name in LATENCIES.items():
        if name in after:
            spent = difference(after[name], before.get(name))
            for quantile in (0.5, 0.99):
                out[f"{key}_p{quantile * 100:.0f}_ms"] = spent.quantile(quantile) * 1000
    return out


def catch_up(node: Node) -> float:
    """Wait until the signer has what the collector has; return the seconds that took (beats come once a second)."""
    began = time.monotonic()
    while time.monotonic() - began < CATCH_UP_SECONDS:
        told = series(node)
        taken, signed = (
            told.total(metrics.BATCHES_TOTAL, f'service="{service}"') for service in ("collector", "signer")
        )
        if taken - signed <= _ALWAYS_BEHIND and told.total(metrics.SPOOL_BYTES, "") < 1 << 20:
            break
        time.sleep(0.2)
    return round(time.monotonic() - began, 1)


def count_lines(node: Node, markers: dict[str, bytes]) -> dict[str, int]:
    """Return by name how many evidence lines hold each marker."""
    counts = dict.fromkeys(markers, 0)
    for path in sorted(node.evidence.glob("*.ndjson.zst")):
        for frame in frames_of(path):
            for line in frame.splitlines():
                for name, marker in markers.items():
                    counts[name] += marker in line
    return counts


def outcome(node: Node, made: dict[str, tuple[bytes, int]]) -> dict[str, Any]:
    """Check a stopped node's evidence against what was made: by name, the marker of its lines and how many.

    `valid` is the verifier's word on the whole chain, the identity of the ledgers with it.  `exact`: each line
    that was made is there once, or the ledgers have lost at least as many as are not.
    """
    report = node.verify()
    lost: dict[str, int] = {}
    for ledger in node.ledgers():
        for cause, n in ledger["lost"].items():
            lost[cause] = lost.get(cause, 0) + n
    lines = count_lines(node, {name: marker for name, (marker, _) in made.items()})
    missing = {name: count - lines[name] for name, (_, count) in made.items() if count != lines[name]}
    total = sum(lost.values())
    exact = all(n > 0 for n in missing.values()) and sum(missing.values()) <= total
    return {
        "lines": lines,
        "lost": total,
        "lost_by_cause": lost,
        "missing": missing,
        "valid": bool(report.valid),
        "faults": [fault.code for fault in report.faults[:5]],
        "exact": exact and bool(report.valid),
        "evidence_bytes": sum(path.stat().st_size for path in node.evidence.iterdir()),
    }


def shares(spent: dict[str, float], count: int) -> dict[str, float]:
    """Return CPU seconds as µs an event."""
    return {name: round(seconds / count * 1e6, 3) for name, seconds in spent.items()}
