"""A node with nothing to record: what its processes cost."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import measure
from tests.system.node import Node, running


def _switches(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep so far."""
    return sum(
        int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )


def watch(node: Node, seconds: float) -> dict[str, Any]:
    """Watch a running node's processes for `seconds`."""
    pids = node.pids()
    cpu, sleeps = measure.cpu_by_part(node), {part: _switches(pid) for part, pid in pids.items()}
    began = time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    rows = {}
    for part, used in measure.cpu_by_part(node).items():
        rows[part] = {
            "percent": round((used - cpu[part]) / spent * 100, 3),
            "wakes_per_second": round((_switches(pids[part]) - sleeps[part]) / spent, 1),
            **measure.memory_mb(pids[part]),
        }
    return {
        "seconds": seconds,
        "parts": rows,
        **{key: round(sum(row[key] for row in rows.values()), 2) for key in ("percent", "pss", "rss")},
    }


def run(seconds: float, settle: float) -> dict[str, Any]:
    """Watch a fresh node for `seconds`, from `settle` seconds after its start on."""
    with tempfile.TemporaryDirectory(prefix="stella-bench-") as name, running(Path(name), "idle") as node:
        time.sleep(settle)
        return watch(node, seconds)
