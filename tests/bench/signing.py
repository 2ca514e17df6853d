"""`make bench-signing`: how long root could rewrite history, and how fast chunks are signed and logged.

The first table is a whole node with a stream of opens: latency from the drain of the ring to the fsync'd chunk and
to the signed statement, for several `rotation.max_age_hours`.  The second is the signer's own code on a chain of
small chunks: closing and signing, then timestamp, log entry, verification and bundle, with a log and a timestamp
authority on this machine (the log is a stand-in, the authority is openssl's).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import anyio

from tests.bench.rates import run
from tests.evidence.chain_maker import COVERAGE, Node, Source, one
from tests.signer.log_kit import Queue, surroundings
from tests.system.node import build_generator

RATE = 20_000
SECONDS = 10.0
CHUNKS = 500
AGES = (3600.0, 1.0, 0.1)


def latencies(program: Path) -> None:
    """Print the first table."""
    print("| max_age | chunks/s | durable p50 / p99 ms | signed p50 / p99 ms | lost |")
    print("|---|---|---|---|---|")
    for age in AGES:
        row = run(program, RATE, SECONDS, 8 << 20, 1, rotation={"max_age_hours": age / 3600})
        signed = (
            f"{row['signed_p50_ms']:.0f} / {row['signed_p99_ms']:.0f}" if row.get("signed_p99_ms") else "at the close"
        )
        print(
            f"| {age:g} s | {1 / age:.4g} | {row['durable_p50_ms']:.0f} / {row['durable_p99_ms']:.0f} | {signed} "
            f"| {row['lost']} |",
            flush=True,
        )


def chain(folder: Path) -> tuple[Node, float]:
    """Return a node with `CHUNKS` signed chunks and how long closing and signing took."""
    node = Node(folder)
    store = node.open()
    source = Source("node-a")
    spent = 0.0
    for n in range(CHUNKS - 1):
        store.commit(*one(source.batch({0: 10}, coverage="" if n else COVERAGE)))
        began = time.monotonic()
        store.close("age")
        spent += time.monotonic() - began
    store.release()
    return node, spent


async def throughput() -> None:
    """Print the second table."""
    print("\n| log | chunks | close and sign, chunks/s | stamp, log, verify, keep: chunks/s |")
    print("|---|---|---|---|")
    for version in (1, 2):
        with tempfile.TemporaryDirectory(prefix="stella-bench-") as name:
            node, signing = chain(Path(name))
            # What a timestamp costs is openssl's start of a process; without one it is the signer's own speed.
            for tsas in (0, 1):
                with surroundings(version, tsas=tsas, checkpoint_seconds=0.02) as around:
                    queue = Queue(Path(name), around, node)
                    began = time.monotonic()
                    done = (await queue.round(most=CHUNKS))[0]
                    spent = time.monotonic() - began
                    assert done.logged == CHUNKS, done
                    print(
                        f"| v{version}, {'with' if tsas else 'without'} timestamps | {CHUNKS} "
                        f"| {CHUNKS / signing:.0f} | {CHUNKS / spent:.0f} |",
                        flush=True,
                    )
                for path in node.evidence.glob("*.sigstore.json"):
                    path.unlink()
                (node.where.state / "checkpoints.json").unlink()


def main() -> int:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory(prefix="stella-gen-") as name:
        latencies(build_generator(Path(name)))
    anyio.run(throughput)
    return 0


if __name__ == "__main__":
    sys.exit(main())
