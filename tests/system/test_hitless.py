"""The collector killed with -9 and upgraded under 50,000 opens a second: nothing is lost, by signed numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.system.node import Node, build_generator, running
from tests.system.test_kill import lost

pytestmark = pytest.mark.kernel

RATE, SECONDS = 50_000, 6


def test_a_collector_that_is_killed_under_load_loses_no_event(tmp_path: Path) -> None:
    """A kill, and an end as for an upgrade: one run, no loss, lanes without a hole when signed, each open one line."""
    program = build_generator(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    count = RATE * SECONDS
    # The ring covers some six seconds of it: a machine that is busy with other things needs more than one.
    with running(tmp_path / "node", "hitless", ring_buffer_size=64 << 20) as node:
        generator = node.cgroup.run(
            program, work, str(count), str(RATE), "16", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert generator.stdin and generator.stdout
        generator.stdout.readline()
        time.sleep(0.5)  # its own files are made: what comes from here on is counted
        generator.stdin.write(b"x")
        generator.stdin.flush()
        for end in (signal.SIGKILL, signal.SIGUSR1):
            time.sleep(1.0)
            victim = node.pids()["collector"]
            os.kill(victim, end)
            wait_for_successor(node, victim)
        generator.communicate(timeout=60)
        node.stop()
        assert node.verify().valid
        ledgers = node.ledgers()
        assert {} == lost(node)
        assert 1 == len({run["run"] for ledger in ledgers for run in ledger["runs"]})
        settled: Counter[int] = Counter()
        for ledger in ledgers:
            for run in ledger["runs"]:
                for lane, first, behind, recorded, filtered, gone in map(row_of, run["lanes"]):
                    assert first == settled[lane], "each chunk goes on where the one before it ended"
                    assert behind - first == recorded + filtered and not gone
                    settled[lane] = behind
        numbers: Counter[tuple[int, int]] = Counter()
        opened = 0
        for line in node.lines():
            numbers[line["lane"], line["seq"]] += 1
            opened += line["event"].get("path", "").startswith(f"{work}/libmodule-")
        assert {1} == set(numbers.values()), "no line twice"
        assert settled.total() == len(numbers), "each number that was handed out is a line"
        assert opened in (count, count + 16), "every open once; with the 16 that made the files, or without"


def wait_for_successor(node: Node, victim: int) -> None:
    """Wait until another collector says that it has gone on with the run."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        said = next((s for s in node.get("/status")["services"] if s["service"] == "collector"), {})
        if said.get("pid") not in (None, victim) and said["detail"].get("adopted"):
            return
        time.sleep(0.05)
    raise AssertionError(f"no collector has gone on\n{node.logs()}")


def row_of(row: list[int] | dict[str, int]) -> tuple[int, ...]:
    """Return a lane's row as numbers."""
    values = row.values() if isinstance(row, dict) else row
    return tuple(int(value) for value in values)
