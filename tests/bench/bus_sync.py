"""`make bench-bus-sync`: what it costs that the bus syncs its store to the disk, at one rate and in one run.

Each setting has a fresh node; they take turns, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.rates import run
from tests.system.node import build_generator

SETTINGS = (120, 10, 1, 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians over the rounds; CPU also as a share of the first setting's."""
    out = [
        "| sync_seconds | CPU µs/event, all | the bus | all, relative | line p99 ms | durable p99 ms | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    base = 0.0
    for setting in SETTINGS:
        mine = [row for row in rows if row["sync_seconds"] == setting]
        cpu = statistics.median(row["cpu_us_total"] for row in mine)
        base = base or cpu
        bus = statistics.median(row["cpu_us"]["nats"] for row in mine)
        line, durable = (statistics.median(row.get(f"{k}_p99_ms", 0.0) for row in mine) for k in ("line", "durable"))
        out.append(
            f"| {setting or 'each message'} | {cpu:.2f} | {bus:.2f} | {cpu / base:.2f} | {line:.0f} | {durable:.0f} "
            f"| {sum(row['lost'] for row in mine)} |"
        )
    return "\n".join(out)


def main() -> int:
    """Run it; 1 when a chain does not verify."""
    parser = argparse.ArgumentParser(prog="make bench-bus-sync", description=__doc__)
    parser.add_argument("--rate", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="stella-gen-") as name:
        program = build_generator(Path(name))
        for _ in range(args.rounds):
            for setting in SETTINGS:
                row = run(program, args.rate, args.seconds, 8 << 20, 1, bus={"sync_seconds": setting})
                rows.append({**row, "sync_seconds": setting})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    return 0 if all(row["valid"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
