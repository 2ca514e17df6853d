"""Opens at rising rates through a whole node: what it holds, and what each event costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import load, machine, measure
from tests.system.node import Node, running

#: A rate counts as held when this share of it was made, nothing was lost, and the rest was on disk soon after.
MADE_SHARE = 0.99
SOON_SECONDS = 3.0
WARM = 2000
SETTLE_SECONDS = 1.5


def run(
    program: Path, rate: int, seconds: float, ring: int, enrichers: int, *, producers: int = 1, **signals: Any
) -> dict[str, Any]:
    """Measure one rate, made by `producers` programs, on a fresh node; `signals` are keys of its configuration."""
    with (
        tempfile.TemporaryDirectory(prefix="stella-bench-") as name,
        running(Path(name), "bench", ring_buffer_size=ring, enrichers=enrichers, **signals) as node,
    ):
        return on(node, program, rate, seconds, producers)


def on(node: Node, program: Path, rate: int, seconds: float, producers: int = 1) -> dict[str, Any]:
    """Measure one rate on a node that has recorded nothing yet; it is stopped then."""
    start = node.cgroup.run
    warm = load.opens(start, program, WARM, WARM)  # everything is warm and known
    time.sleep(SETTLE_SECONDS)
    before, cpu = measure.beats(node), measure.cpu_by_part(node)
    with machine.watched() as busy:
        made = load.opens_of_many(start, program, int(rate * seconds), rate, producers)
    memory = measure.memory_by_part(node)
    lag = measure.catch_up(node)
    time.sleep(1.2)  # the last beats
    spent = {n: after - cpu.get(n, 0.0) for n, after in measure.cpu_by_part(node).items()}
    after = measure.beats(node)
    node.stop()
    checked = measure.outcome(node, {"opens": (load.MARKER, warm.opens + made.opens)})
    row: dict[str, Any] = {
        "rate": rate,
        "producers": producers,
        "made_per_second": round(made.count / made.wall_seconds),
        "count": made.count,
        "lag_seconds": lag,
        "generator_cpu_ns": round(made.cpu_ns),
        "cpu_us": measure.shares(spent, made.count),
        "pss_mb": {n: m["pss"] for n, m in memory.items()},
        "bytes_per_line": round(checked["evidence_bytes"] / max(1, checked["lines"]["opens"]), 1),
        **busy,
        **measure.latencies(after, before),
        **checked,
    }
    row["cpu_us_total"] = round(sum(row["cpu_us"].values()), 3)
    row["pss_mb_total"] = round(sum(row["pss_mb"].values()), 1)
    row["held"] = (
        row["exact"] and not row["lost"] and row["made_per_second"] >= MADE_SHARE * rate and lag <= SOON_SECONDS
    )
    return row
