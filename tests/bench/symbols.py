"""What symbols cost: `python -m tests.bench.symbols [FILE]...` prints the table of docs/performance.md."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stella_enricher.symbols.capturing import Limits
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.resolver import Resolver
from stella_enricher.symbols.store import Store
from stella_enricher.symbols.table import Table
from stella_shared.symbols import Question

DEFAULT = ("libc.so.6", "libssl.so.3", "libpython3.11.so.1.0", "libLLVM-14.so.1")
LOOKUPS = 50_000


def rss_bytes() -> int:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(path: Path, debug_directory: str, folder: Path) -> str:
    """Return one row, made in this process, which holds nothing else."""
    finder = Finder([Path(debug_directory)] if debug_directory else [])
    store = Store(folder, 1 << 30)
    resolver = Resolver(finder, store, max_answers=10 * LOOKUPS, max_table_bytes=1 << 30, limits=Limits(seconds=60))
    with finder.of_path(path) as (_, build_id):
        begin = time.perf_counter()
        reason = resolver.load(build_id, path=path)
        read_ms = (time.perf_counter() - begin) * 1000
        if reason:
            return f"| {path.name} | {reason} |"
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    data = store.path(build_id).read_bytes()
    before = rss_bytes()
    begin = time.perf_counter()
    table = Table(data)
    load_ms = (time.perf_counter() - begin) * 1000
    held = (rss_bytes() - before) / (1 << 20)
    drawn = random.Random(1)
    segment = max(table.segments, key=lambda s: s[1])
    questions = [Question(build_id, segment[0] + drawn.randrange(segment[1])) for _ in range(LOOKUPS)]
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        for question in questions:
            resolver.resolve(question)
        times.append((time.perf_counter() - begin) / LOOKUPS * 1e9)
    name = f"{path.name} with its debug file" if debug_directory else path.name
    inlined = "yes" if not table.head.inlined_reason else "no"
    return (
        f"| {name} | {len(table):,} | {inlined} | {read_ms:,.0f} | "
        f"{peak:,} | {len(data) / 1024:,.0f} | {load_ms:.1f} | {held:.1f} | {times[0]:,.0f} | {times[1]:,.0f} |"
    )


def main() -> None:
    """Measure each file in a process of its own."""
    if sys.argv[1:2] == ["--one"]:
        print(measure(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
        return
    folder = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"
    paths = [Path(word) for word in sys.argv[1:]] or [folder / name for name in DEFAULT]
    print("| file | ranges | inlined | read ms | child MB | kept KB | load ms | MB | ns first | ns again |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = [(path, "") for path in paths if path.exists()] + [(folder / "libc.so.6", "/usr/lib/debug")]
    for path, debug_directory in rows:
        with tempfile.TemporaryDirectory() as kept:
            command = [sys.executable, "-m", "tests.bench.symbols", "--one", path, debug_directory, kept]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
