"""The machine that figures are taken on: what it is, and its own prices for what every figure is made of.

A virtual machine's processor changes from day to day, so figures without these beside them say nothing.
"""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import load

PAGE = mmap.PAGESIZE
TICKS = os.sysconf("SC_CLK_TCK")


def touch(size: int) -> float:
    """Use `size` bytes of memory once and give them back; return the seconds that took.

    A virtual machine gets its memory from the host page by page at first use, which may cost more than all else
    here together.  That is the machine's start and no part of the pipeline.
    """
    began = time.perf_counter()
    with mmap.mmap(-1, max(PAGE, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        return time.perf_counter() - began


def facts(program: Path, touch_gib: int) -> dict[str, Any]:
    """Return what this machine is and costs; uses `touch_gib` GiB of its memory once on the way."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    size = min(touch_gib << 30, memory // 2)
    first = touch(size) if size else 0.0
    again = 64 << 20
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "bare_open_ns": round(median(load.bare(program, 500_000).wall_ns for _ in range(3))),
        "page_first_us": round(first / (size / PAGE) * 1e6, 3) if size else None,
        "page_us": round(median(touch(again) for _ in range(5)) / (again / PAGE) * 1e6, 3),
    }


def _cpu_ticks() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Tell at the end how many cores were busy meanwhile, and how many the host took away."""
    out: dict[str, float] = {}
    before, began = _cpu_ticks(), time.monotonic()
    yield out
    spent = time.monotonic() - began
    user, nice, system, _, _, irq, softirq, steal = (
        (b - a) / TICKS / spent for a, b in zip(before, _cpu_ticks(), strict=True)
    )
    out["busy_cores"] = round(user + nice + system + irq + softirq, 2)
    out["stolen_cores"] = round(steal, 2)


def version(*command: str) -> str:
    """Return the first line that a program prints about itself, "" when it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip().split("\n", 1)[0]
