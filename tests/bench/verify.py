"""`make bench-verify`: how fast `verify-chain` is, beside programs that only hash the same files.

Makes a chain of large chunks with the signer's own store, out of lines like the one in
docs/life-of-an-event.md.  Then it times, in turns and with the files in the page cache, `zstdcat` into `sha256sum`,
into `openssl dgst -sha256`, and `stella signals verify-chain`, as whole processes, and prints the best of each.

The chain is made in a process of its own: a program's peak memory counts from what its parent held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from stella_shared.evidence.compressed import frames_of

STELLA = Path(sys.executable).with_name("stella")
NODE = "bench-node"
BATCH = 8000


def openat_line(node: str, lane: int, seq: int, run: str = "", boot: str = "") -> bytes:
    """Return a line of the shape that an enricher writes."""
    pid = 20_000 + seq % 7919
    return (
        b'{"boot_id":"%s","cgroup_id":%d,"comm":"%s","event":{"access":"read","flags":524288,"mode":0,'
        b'"path":"/usr/lib/x86_64-linux-gnu/lib%d.so.6","path_source":"user_pointer_at_exit","result":3,'
        b'"type":"file_open"},"lane":%d,"node":"%s","pid":%d,"run":"%s","seq":%d,"src":"sys_enter_openat",'
        b'"tid":%d,"ts_ns":%d,"uid":%d}\n'
    ) % (
        boot.encode(), 54_270 + seq % 13, (b"cat", b"python3", b"nginx")[seq % 3], seq % 4099, lane,
        node.encode(), pid, run.encode(), seq, pid, 4_706_008_623_267 + seq * 6151, seq % 2 * 1000,
    )  # fmt: skip


class Took(NamedTuple):
    """One process, from start to end."""

    seconds: float
    rss_bytes: int


def make_chain(folder: Path, chunks: int, chunk_bytes: int) -> None:
    """Make a node with that many chunks of at least that size, and the genesis chunk before them."""
    from tests.evidence.chain_maker import COVERAGE, Node, Source, packed

    class Opens(Source):
        line = staticmethod(openat_line)

    node = Node(folder, NODE)
    store = node.open()
    source = Opens(NODE)
    for n in range(chunks):
        while store.bytes < chunk_bytes:
            made = [source.batch({0: BATCH, 4: BATCH}, coverage="" if source.number else COVERAGE) for _ in range(4)]
            store.commit([step for step, _ in made], [packed(body) for _, body in made])
        store.close("size")
        print(f"\rchunk {n + 1} of {chunks} made", end="", file=sys.stderr)
    store.release()
    print(file=sys.stderr)


def run(command: list[str]) -> Took:
    """Run a program to its end; raises when it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return Took(seconds, used.ru_maxrss << 10)


def main() -> None:
    """Make the chain, time the programs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk-mb", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stella-bench-") as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=make_chain, args=(Path(folder), given.chunks, given.chunk_mb * 10**6)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the chain could not be made")
        evidence = Path(folder) / "evidence"
        # (The first chunk is empty, which zstdcat takes for a fault.)
        files = sorted(str(path) for path in evidence.glob("*.ndjson.zst") if path.stat().st_size)
        size = sum(len(frame) for path in files for frame in frames_of(Path(path)))
        packed = sum(Path(path).stat().st_size for path in files)
        commands = {
            "zstdcat, sha256sum": ["sh", "-c", 'zstdcat "$@" | sha256sum', "sh", *files],
            "zstdcat, openssl dgst -sha256": ["sh", "-c", 'zstdcat "$@" | openssl dgst -sha256', "sh", *files],
            "stella signals verify-chain": [str(STELLA), "signals", "verify-chain", str(evidence)],
        }
        run(commands["zstdcat, sha256sum"])  # so that every file is in the page cache
        took: dict[str, list[Took]] = {name: [] for name in commands}
        for _ in range(given.repetitions):
            for name, command in commands.items():
                took[name].append(run(command))
    best = {name: min(times).seconds for name, times in took.items()}
    print(
        f"{given.chunks} chunks, {size / 1e6:.0f} MB of lines in {packed / 1e6:.0f} MB; best of {given.repetitions}\n"
    )
    print("| program | s | MB/s | of sha256sum's speed | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name, times in took.items():
        ratio = best["zstdcat, sha256sum"] / best[name]
        rss = max(one.rss_bytes for one in times) / 1e6
        print(f"| `{name}` | {best[name]:.2f} | {size / 1e6 / best[name]:,.0f} | {ratio:.2f} | {rss:.0f} |")


if __name__ == "__main__":
    main()
