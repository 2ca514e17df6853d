"""kill -9 of each part in turn, under load: the node heals, the chain verifies, the identity holds."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.node import Node, build_generator, running

pytestmark = pytest.mark.kernel

RATE = 8_000


def healthy(node: Node, *, but_not: dict[str, int] | None = None, within: float = 30.0) -> None:
    """Wait until every part is healthy, and the killed one is another process."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            pids = node.pids()
            fresh = all(pids.get(name) not in (None, pid) for name, pid in (but_not or {}).items())
            if fresh and node.get("/health")["status"] == "ok":
                return
        except (OSError, KeyError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"not healthy within {within} s: {node.get('/health')}\n{node.logs()}")


def lost(node: Node) -> dict[str, int]:
    """Return all losses of the signed ledgers by cause."""
    out: dict[str, int] = {}
    for ledger in node.ledgers():
        for cause, n in ledger["lost"].items():
            out[cause] = out.get(cause, 0) + n
    return out


@pytest.mark.slow
def test_every_part_may_be_killed(tmp_path: Path) -> None:
    """Each part dies once while 8,000 opens a second go on; every open is recorded or numbered as lost."""
    program = build_generator(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    with running(tmp_path / "node", "kill", enrichers=2, ring_buffer_size=16 << 20) as node:
        seconds = 26
        count = RATE * seconds
        generator = node.cgroup.run(
            program, work, str(count), str(RATE), "16", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert generator.stdin and generator.stdout
        generator.stdout.readline()
        generator.stdin.write(b"x")
        generator.stdin.flush()
        time.sleep(1.5)
        for name in ("enricher-1", "signer", "nats", "gateway", "collector"):
            victim = node.pids()[name]
            os.kill(victim, signal.SIGKILL)
            healthy(node, but_not={name: victim})
            time.sleep(0.5)
        generator.communicate(timeout=60)
        time.sleep(1.0)
        healthy(node)
        node.stop()
        report = node.verify()
        assert report.valid, report
        ledgers = node.ledgers()
        recorded = sum(1 for line in node.lines() if line["event"].get("path", "").startswith(f"{work}/libmodule-"))
        losses = lost(node)
        assert {} == losses
        assert 1 == len({run["run"] for ledger in ledgers for run in ledger["runs"]}), "its successor goes on with it"
        assert all(not run["unclean"] for ledger in ledgers for run in ledger["runs"]), ledgers
        assert count <= recorded <= count + 16, "and what made the files before the start may have been seen"
        sequences = [(line["run"], line["lane"], line["seq"]) for line in node.lines()]
        assert len(set(sequences)) == len(sequences)
